"""Reads the documentation: its pages, code blocks and links."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from textwrap import indent

from helpers.paths import ROOT, TESTS

FIRST_COMPILE = "asapc compile models/digits.pt"  # of the README
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[str]:
    """The lines of a shell block, less their comments."""
    lines = (line.split("  #")[0].strip() for line in block.splitlines())
    return [line for line in lines if line]


def prose(page: Path) -> str:
    """A page without its code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def links(page: Path) -> list[str]:
    """Targets of a page's relative links."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tables(lines: Iterable[str]) -> list[list[list[str]]]:
    """The tables among lines of Markdown, each as rows of cells, the rule below the head left out."""
    of_page: list[list[list[str]]] = []
    inside = False
    for line in lines:
        if line.startswith("|"):
            of_page += [] if inside else [[]]
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            of_page[-1] += [] if set(line) <= set("|-:") else [cells]
        inside = line.startswith("|")
    return of_page


def write_sources(page: Path, folder: Path) -> None:
    """Write each Python block of a page that begins with a file's name, as `# train.py`, into a folder."""
    for language, text in code_blocks(page):
        name = re.match(r"# (\w+\.py)\n", text)
        if language == "python" and name:
            (folder / name[1]).write_text(text)


def quick_words(code: str = "from asapc.cli import main\nmain()") -> list[str]:
    """What to give to Python so that it runs some code, the command by default, as `helpers.quick` does."""
    path = f"import sys; sys.path.insert(1, {str(TESTS)!r})"
    body = indent(code, "    ")
    return ["-c", f"{path}\nfrom helpers.quick import quick_compilation\nwith quick_compilation():\n{body}"]


def run(words: list[str], folder: Path, **environment: str) -> str:
    """Run Python in a folder; return what it prints."""
    variables = {**os.environ, **environment}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
