"""The commands that the README shows are run as they stand there."""

import shlex
from pathlib import Path
from textwrap import indent

import pytest
from helpers import documents
from helpers.documents import code_blocks, commands
from helpers.paths import ROOT

README, TUTORIAL = ROOT / "README.md", ROOT / "docs" / "tutorial.md"
# Those of installing and of `make` are run by .ci/run, on a clean checkout.
SKIPPED = ("make ", "pip ")


def lines_of(page: Path) -> list[str]:
    return [line for language, text in code_blocks(page) if language == "sh" for line in commands(text)]


COMMANDS = [line for line in lines_of(README) if not line.startswith(SKIPPED)]
# Those on a model of one's own: tests/test_tutorial.py makes it and runs them.
OWN = [line for line in COMMANDS if "--model" in line]
SHIPPED = [line for line in COMMANDS if line not in OWN]
PYTHON = [text for language, text in code_blocks(README) if language == "python"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as the README assumes it: the checkout's models/ in it, nothing else."""
    path = tmp_path_factory.mktemp("readme")
    (path / "models").symlink_to(ROOT / "models")
    return path


def run_command(command: str, folder: Path) -> str:
    return documents.run(["-m", "asapc.cli", *shlex.split(command)[1:]], folder)


def test_a_model_of_ones_own_takes_three_commands_and_those_are_the_tutorials() -> None:
    assert [line.split()[1] for line in OWN] == ["inspect", "compile", "verify"]
    for command in OWN:
        assert any(line == command or line.startswith(f"{command} ") for line in lines_of(TUTORIAL)), command


def test_the_result_is_run_as_in_the_tutorial() -> None:
    code = next(text for text in PYTHON if "onnxruntime" in text)
    assert any(code in text for language, text in code_blocks(TUTORIAL) if language == "python")


@pytest.mark.parametrize("command", SHIPPED)
def test_a_command_of_the_readme_runs(command: str, folder: Path) -> None:
    assert command.startswith("asapc "), command
    run_command(command, folder)


def test_the_python_of_the_readme_runs(folder: Path) -> None:
    (code,) = (text for text in PYTHON if 'compile_model("models/digits.pt"' in text)
    program = f"from helpers.quick import quick_compilation\nwith quick_compilation():\n{indent(code, '    ')}"
    assert "PASSED" in documents.run(["-c", program], folder, PYTHONPATH=str(ROOT / "tests"))
    assert (folder / "exact.asap" / "model.onnx").is_file()
