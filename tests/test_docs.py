"""Links lead somewhere, quoted messages are those of the source, and the glossary is in order."""

import ast
import re
from pathlib import Path

import pytest
from helpers.documents import PAGES, anchors, links
from helpers.paths import ROOT

SOURCES = [ROOT / "cli.py", *(ROOT / "asapc").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
HOLE = "…"


def messages_quoted() -> list[str]:
    """The first cell of each table row of the troubleshooting page that is code."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)


def template(node: ast.AST) -> str | None:
    """A string of the source with a hole for each value that is put into it."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in parts)
    return None


@pytest.fixture(scope="module")
def templates() -> set[str]:
    nodes = (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text())))
    return {text for node in nodes if (text := template(node)) is not None}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_troubleshooting_page_quotes_messages() -> None:
    assert len(messages_quoted()) > 60
    assert len(set(messages_quoted())) == len(messages_quoted())


@pytest.mark.parametrize("message", messages_quoted())
def test_a_message_that_is_quoted_stands_in_the_source(message: str, templates: set[str]) -> None:
    assert message in templates


def test_a_message_that_has_changed_is_noticed(templates: set[str]) -> None:
    assert "… exists already" in templates
    assert "… exists now" not in templates


def test_the_glossary_is_alphabetical_and_links_each_term() -> None:
    page = ROOT / "docs" / "glossary.md"
    entries = re.split(r"^### ", page.read_text(), flags=re.MULTILINE)[1:]
    terms = [entry.splitlines()[0] for entry in entries]
    assert terms == sorted(terms, key=str.lower)
    assert all("](" in entry for entry in entries)


def test_fidelity_terms_in_shell_examples_are_quoted() -> None:
    """Unquoted, bash takes `>=0.99` for a redirection."""
    for page in PAGES:
        assert not re.search(r"--fidelity [^'\s`]*[<>]", page.read_text()), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    folders = "asapc|passes|models|tests|benchmarks|docs"
    for name in re.findall(rf"`((?:{folders})/[\w./]+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), name
