"""The commands that the README shows are run as they stand there."""

import shlex
from pathlib import Path

import pytest
from helpers import documents
from helpers.documents import FIRST_COMPILE, code_blocks, commands
from helpers.paths import ROOT

README, TUTORIAL = ROOT / "README.md", ROOT / "docs" / "tutorial.md"
# .ci/run runs those that install, and `make`, on a clean checkout; tests/cli/test_train.py, of `make test-all`, trains.
SKIPPED = ("make ", "pip ", "asapc train ")


def lines_of(page: Path) -> list[str]:
    return [line for language, text in code_blocks(page) if language == "sh" for line in commands(text)]


COMMANDS = [line for line in lines_of(README) if not line.startswith(SKIPPED)]
# Those on a model of one's own: tests/test_tutorial.py makes it and runs them.
OWN = [line for line in COMMANDS if "shapes" in line]
SHIPPED = [line for line in COMMANDS if line not in OWN]
PYTHON = [text for language, text in code_blocks(README) if language == "python"]


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
def test_a_command_of_the_readme_runs(command: str, readme_folder: Path) -> None:
    assert command.startswith("asapc "), command
    if command == FIRST_COMPILE:
        assert (readme_folder / "digits.asap" / "model.onnx").is_file()
    else:
        run_command(command, readme_folder)


def test_the_folder_of_the_readme_is_made_by_its_own_command() -> None:
    assert FIRST_COMPILE in SHIPPED


def test_the_python_of_the_readme_runs(readme_folder: Path) -> None:
    (code,) = (text for text in PYTHON if 'compile("models/digits.pt"' in text)
    assert "PASSED" in documents.run(documents.quick_words(code), readme_folder)
    assert (readme_folder / "exact.asap" / "model.onnx").is_file()
