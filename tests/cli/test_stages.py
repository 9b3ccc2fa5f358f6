"""How a running stage is shown: a clock on a terminal, plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from asapc import terminal
from asapc.events import OnEvent, Timed, stage
from asapc.terminal import Clock, stages


def work(on_event: OnEvent) -> None:
    with stage("measure", on_event) as step:
        step.advance("batch 1", remaining=7.0)
        step.summary = "done well"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_stage_begins_and_ends_with_a_line_where_there_is_no_terminal(is_terminal, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=80, color_system=None)
    monkeypatch.setattr(terminal, "err", console)
    with stages(visible=True) as on_event:
        work(on_event)
    assert "measure     0.0 s  done well" in screen.getvalue()
    if not is_terminal:
        assert screen.getvalue() == "  measure  begins\n  measure     0.0 s  done well\n"


def test_nothing_is_shown_where_that_is_asked_for(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=screen, force_terminal=True))
    with stages(visible=False) as on_event:
        work(on_event)
    assert screen.getvalue() == ""


def test_a_clock_says_how_long_a_stage_takes_and_what_is_left_where_that_is_known(monkeypatch):
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    clock = Clock()
    clock.start("measure")
    now = 103.4
    assert str(clock.__rich__()).split() == ["measure", "3.4", "s"]
    clock.detail, clock.end = "batch 1", 110.0
    assert str(clock.__rich__()).split(None, 3)[3] == "batch 1, about 7 s left"
    now = 111.0  # it takes longer: nothing is promised
    assert str(clock.__rich__()).split(None, 3)[3] == "batch 1"


def test_colour_is_for_terminals_and_for_those_that_want_it(monkeypatch):
    def shown(**options: object) -> str:
        screen = io.StringIO()
        terminal.say(Console(file=screen, width=80, **options), "error: no", style="red")
        return screen.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[31m" in shown(force_terminal=True)
    assert shown() == "error: no\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in shown(force_terminal=True)


def test_the_seconds_of_stages_that_ended_are_kept():
    events = []
    timed = Timed(events.append)
    work(timed)
    with pytest.raises(ValueError, match="broken"), stage("engine", timed):
        raise ValueError("broken")
    assert list(timed.seconds) == ["measure"]
    assert len(events) == 4
