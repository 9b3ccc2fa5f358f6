"""Tables fit a terminal of 80 columns, whatever sites are called, and no number is broken."""

import io
from pathlib import Path

import pytest
from helpers.reports import report
from rich.console import Console

from asapc import showing, terminal

NAMES = ("a", "blocks.0.attention", "model.encoder.layers.11.self_attention.sinkhorn_attention_with_a_long_name")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "pipe"])
def test_tables_fit_80_columns(name, is_terminal, monkeypatch):
    data = report()
    for site in data["sites"]:
        site["name"] = f"{name}{site['name']}"
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=is_terminal, color_system=None)
    monkeypatch.setattr(terminal, "out", console)
    grids = [part for part in showing.compilation(Path("out"), data) if isinstance(part, showing.Grid)]
    terminal.show([*grids, *showing.inspection(data["sites"])] if is_terminal else grids)
    text = screen.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for grid in grids:
        cells = [cell for rows in grid.groups for row in rows for cell in row]
        numbers = [c for c in cells if c.replace(".", "").isdigit()]
        assert numbers
        assert all(number in text.split() for number in numbers)
