"""Standard streams that are closed, full, or read by nobody: no defect, and a result is whole."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.slow import slow

COMMAND = """
from pathlib import Path
from asapc import cli, terminal
from asapc.writing.folder import output_file

@cli.command()
def spin(as_json: cli.Json = False):
    with output_file(Path("result.txt"), force=False) as file:
        file.write_text("whole")
    terminal.say(terminal.err, "a message")
    if as_json:
        terminal.print_json({"lines": ["x"] * 50_000})
    else:
        terminal.show(["x" * 99] * 1000)

cli.main()
"""


def spin(shell: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a command that writes a file and then prints, in a shell line where $RUN stands for it."""
    Path("spinning.py").write_text(COMMAND)
    run = shlex.join([sys.executable, "-m", "spinning", "spin", *arguments])
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell.replace("$RUN", run)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "shell", ["$RUN | head -n 1", slow("$RUN --json | true"), "$RUN >&-", slow("$RUN 2>&-"), slow("$RUN 2>/dev/full")]
)
def test_a_stream_that_nobody_reads_ends_no_run(shell):
    result = spin(shell)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
    assert Path("result.txt").read_text() == "whole"


@pytest.mark.parametrize("arguments", [(), ("--json",)], ids=["table", "json"])
def test_a_full_standard_output_is_an_error_of_one_line_and_the_result_is_whole(arguments):
    result = spin("$RUN >/dev/full", *arguments)
    assert result.returncode == 1
    message, error, hint = result.stderr.splitlines()
    assert message == "a message"
    assert error == "error: cannot print on standard output: no space left on device"
    assert hint.startswith("hint: ")
    assert Path("result.txt").read_text() == "whole"
