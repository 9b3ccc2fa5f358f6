"""Ctrl-C and SIGTERM: exit codes 130 and 143, and nothing is left behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import QUICK
from helpers.slow import slow

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# Far more than it takes on a busy machine; no test waits for it unless it fails.
SECONDS = 300


def start(*command: object) -> subprocess.Popen:
    # A shell that runs the tests in the background ignores SIGINT, and its children would inherit that.
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def spin(body: str) -> tuple[int, str, str]:
    """Run a command of that body, which has `interrupt`; returns the exit code, stdout and stderr."""
    code = """
import os, signal, sys
from contextlib import suppress
from pathlib import Path
from asapc import cli, terminal
from asapc.events import stage

def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)

@cli.command()
def spin():
    BODY

cli.main()
""".replace("BODY", body.strip().replace("\n", "\n    "))
    Path("spinning.py").write_text(code)
    process = start("-B", "-m", "spinning", "spin")  # what is left in this folder is compared
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        Path("spinning.py").unlink()
    return process.returncode, out, err


def test_ctrl_c_within_an_executed_string_exits_with_130():
    code, _, err = spin("exec('interrupt()')")
    assert (code, err) == (130, "interrupted; no output was written\n")


@pytest.mark.parametrize("number", CODES)
def test_a_signal_that_is_swallowed_ends_the_run_at_its_next_step(number):
    code, out, err = spin(f"""
with terminal.stages(visible=False) as on_event:
    with stage("capture", on_event):
        with suppress(BaseException):
            interrupt({number:d})
        print("swallowed")
        on_event(None)
        print("went on")
""")
    assert (code, out) == (CODES[number], "")
    assert err == "swallowed\ninterrupted; no output was written\n"


def test_a_signal_that_is_swallowed_in_the_last_step_is_not_lost():
    code, _, err = spin("""
with suppress(BaseException):
    interrupt()
""")
    assert (code, err) == (130, "interrupted; no output was written\n")


def test_an_interruption_that_became_another_exception_is_no_defect():
    code, _, err = spin("""
try:
    interrupt()
except BaseException:
    raise ImportError("partially initialized module")
""")
    assert (code, err) == (130, "interrupted; no output was written\n")


def test_an_interruption_where_no_exception_can_go_is_silent_and_not_lost():
    code, _, err = spin("""
class Falling:
    def __del__(self):
        interrupt()
Falling()
""")
    assert (code, err) == (130, "interrupted; no output was written\n")


def test_ctrl_c_while_the_command_is_imported_exits_with_130():
    code = """
import builtins, os, runpy, signal, sys
real = builtins.__import__
def importing(name, *more, **others):
    if name == "typer":
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *more, **others)
builtins.__import__ = importing
sys.argv = ["asapc", "--version"]
runpy.run_module("asapc", run_name="__main__")
"""
    process = start("-c", code)
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err


def test_an_output_that_was_written_before_the_signal_is_said_to_be():
    code, _, err = spin("""
from asapc.writing.folder import output_file
rename = Path.rename
def interrupted_rename(path, target):
    interrupt()
    rename(path, target)
Path.rename = interrupted_rename
with output_file(Path("result.txt"), force=False) as file:
    file.write_text("whole")
""")
    assert (code, err) == (130, "interrupted; written in full before that: result.txt\n")
    assert [path.name for path in Path.cwd().iterdir()] == ["result.txt"]


# Imports come before "load", and after "export" NVIDIA's compiler runs in a process of its own.
@pytest.mark.parametrize(("stage", "number"), [("load", signal.SIGINT), slow("export", signal.SIGTERM)])
def test_a_signal_leaves_nothing_behind(stage, number, small, tmp_path_factory, monkeypatch):
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = start("-m", "asapc", "compile", small, *QUICK, "--out", "deep/out")
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.split()[:1] == [stage]:
                break
        process.send_signal(number)
        out, rest = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == CODES[number], "".join(lines) + rest
    assert out == ""
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert list(Path.cwd().iterdir()) == []
    assert list(temporary.iterdir()) == []
