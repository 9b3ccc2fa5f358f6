"""The generated parts of a document, each between two markers."""

from collections.abc import Iterable
from pathlib import Path


def replace_generated(document: Path, lines: Iterable[str], part: str = "") -> None:
    """Write lines between the markers of a document, or of one of its parts; what stands around them stays.

    Raises:
        ValueError: the document has no such markers.
    """
    begin, end = (f"<!-- {f'generated {part}'.strip()}: {place} -->" for place in ("begin", "end"))
    before, first, rest = document.read_text().partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"{document} has no part between {begin} and {end}")
    body = "\n".join(lines)
    document.write_text(f"{before}{begin}\n\n{body}\n\n{end}{after}")
