"""The commands that the README shows are run as they stand there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
# Those of installing and of `make` are run by .ci/run, on a clean checkout.
SKIPPED = ("make ", "pip ", "git ", "bash ", "python -m benchmarks")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [
    line.split("  #")[0].strip()
    for block in blocks("sh")
    for line in block.splitlines()
    if line.strip() and not line.startswith(SKIPPED)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as the README assumes it: the checkout's models/ in it, nothing else."""
    path = tmp_path_factory.mktemp("readme")
    (path / "models").symlink_to(ROOT / "models")
    return path


def test_the_readme_shows_commands_and_python() -> None:
    assert COMMANDS
    assert blocks("python")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command: str, folder: Path) -> None:
    assert command.startswith("asapc "), command
    words = [sys.executable, "-m", "asapc.cli", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", blocks("python"))
def test_python_of_the_readme_runs(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
