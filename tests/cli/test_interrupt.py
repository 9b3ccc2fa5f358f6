"""Ctrl-C: exit code 130, and nothing is left behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command import QUICK


def test_ctrl_c_within_an_executed_string_exits_with_130():
    code = """
from asapc import cli
cli.options_of = lambda *_: exec("print('begun', flush=True)\\nwhile True: pass")
cli.main()
"""
    Path("interrupted.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "-m", "interrupted", "compile", "any.pt"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()


# After the export NVIDIA's compiler runs, whose callbacks into Python swallow exceptions.
@pytest.mark.parametrize("stage", ["load", "export"])
def test_ctrl_c_exits_with_130_and_leaves_nothing_behind(stage, small):
    # A shell that runs the tests in the background ignores SIGINT, and its children would inherit that.
    process = subprocess.Popen(
        [sys.executable, "-m", "asapc.cli", "compile", small, *QUICK, "--out", "deep/out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.split()[:1] == [stage]:
                break
        time.sleep(0.2)  # into the next stage
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, "".join(lines) + rest
    assert out == ""
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert list(Path.cwd().iterdir()) == []
