"""The generated part of a document, between two markers."""

from collections.abc import Iterable
from pathlib import Path

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def replace_generated(document: Path, lines: Iterable[str]) -> None:
    """Write lines between the markers of a document; what stands around them stays."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    body = "\n".join(lines)
    document.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")
