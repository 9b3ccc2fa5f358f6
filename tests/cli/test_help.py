"""What the command says of itself, and wrong usage."""

import io
import subprocess
import sys

import pytest
from helpers.command import run
from rich.console import Console
from typer.testing import CliRunner

import asapc
from asapc.cli import app
from asapc.config import OPTIONS
from asapc.terminal import BUDGET_MISSED, CONFIG_FILE, ENDS, LATENCY_ENDS, say

COMMANDS = (
    *("compile", "inspect", "tradeoffs", "verify", "bench", "check", "report", "costs", "approx", "train", "eval"),
    "doctor",
)


def words(text: str) -> str:
    """A text without the frames and line breaks of help."""
    return " ".join(text.replace("│", " ").split())


def test_the_version_is_printed_alone():
    result = run("--version")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{asapc.__version__}\n", "")


def test_help_names_the_commands_and_the_exit_codes():
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in (*COMMANDS, "--install-completion"))
    assert ENDS.format(BUDGET_MISSED + LATENCY_ENDS) in words(result.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shows_examples_and_the_exit_codes(command):
    result = run(command, "-h")
    assert result.exit_code == 0
    assert result.stdout == run(command, "--help").stdout
    assert words(result.stdout).partition("Examples:")[2].count(f"asapc {command} ") == 2
    gates = {"compile": BUDGET_MISSED, "verify": BUDGET_MISSED, "check": BUDGET_MISSED + LATENCY_ENDS}
    assert ENDS.format(gates.get(command, "")) in words(result.stdout)


def test_help_shows_every_flag_with_its_choices_whole_and_its_default_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run("compile", "--help")
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for option in (*OPTIONS.values(), CONFIG_FILE):
        row = next(line.strip("│ ").split() for line in lines if option.flag in line.strip("│ ").split()[:1])
        assert row[1] == (option.metavar or "<bool>")
        assert not option.shown_default or f"[default: {option.shown_default}]" in words(result.stdout)
    for flag in ("--json", "--quiet", "-h"):
        assert flag in result.stdout.split()
    for group in {option.group for option in OPTIONS.values()}:
        assert f"─ {group or 'Options'} ─" in result.stdout


def test_a_command_takes_the_options_that_apply_to_it():
    inspect, verify = run("inspect", "--help").stdout, words(run("verify", "--help").stdout)
    assert "--input-shape" in inspect
    assert "--calib" in inspect
    assert "--fidelity" not in inspect
    assert "--fidelity" in verify
    assert "[default: what the model was compiled to keep]" in verify
    assert "--calib" not in verify


def test_the_file_may_be_of_any_format():
    for command in ("compile", "inspect"):
        shown = words(run(command, "--help").stdout)
        assert all(format_ in shown for format_ in ("Checkpoint", "--model", ".pt2", "ONNX"))


@pytest.mark.parametrize(
    ("line", "choices"),
    [
        ("--lowering ", {"auto", "materialised", "fused"}),
        ("--lowering f", {"fused"}),
        ("--precision float", {"float32", "float16"}),
        ("--early-stop ", {"bound", "refuse"}),
        ("-O ", {"0", "1", "2"}),
    ],
)
def test_a_shell_completes_choices(line, choices):
    text = f"asapc compile model.pt {line}"
    variables = {"_ASAPC_COMPLETE": "complete_bash", "COMP_WORDS": text, "COMP_CWORD": str(len(text.split(" ")) - 1)}
    result = CliRunner().invoke(app, [], prog_name="asapc", env=variables)
    assert set(result.stdout.split()) == choices


SENTENCE = "error: the file /somewhere/far/away/in/a/folder/with/a/very-long-name/model.pt is [bold] and was not read"


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_long_line_wraps_between_words_on_a_terminal_and_stays_whole_elsewhere(width):
    terminal, pipe = io.StringIO(), io.StringIO()
    say(Console(file=terminal, width=width, force_terminal=True, color_system=None), SENTENCE)
    say(Console(file=pipe, width=width), SENTENCE)
    assert pipe.getvalue() == SENTENCE + "\n"
    lines = terminal.getvalue().splitlines()
    assert [word for line in lines for word in line.split()] == SENTENCE.split()
    assert all(len(line.rstrip()) <= width or " " not in line.strip() for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("compile",),
        ("inspect",),
        ("translate", "model.pt"),
        ("compile", "model.pt", "--colour"),
        ("compile", "model.pt", "--seed", "many"),
        ("train", "digits", "--steps", "0"),
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_the_module_runs_as_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "asapc.cli", "--version"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"{asapc.__version__}\n")
