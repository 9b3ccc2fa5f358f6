"""The commands that the README shows are run as they stand there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
# Those of installing and of `make` are run by .ci/run, on a clean checkout.
COMPILE = "asapc compile models/digits.pt"
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


def run(words: list[str], folder: Path, seed: str = "random") -> str:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_command(command: str, folder: Path, seed: str = "random") -> str:
    return run(["-m", "asapc.cli", *shlex.split(command)[1:]], folder, seed)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != COMPILE])
def test_a_command_of_the_readme_runs(command: str, folder: Path) -> None:
    assert command.startswith("asapc "), command
    run_command(command, folder)


def test_compiling_from_the_command_line_and_from_python_gives_the_same_bytes(folder: Path) -> None:
    """In two processes with two hash seeds, so that the order of a set cannot hide."""
    assert COMPILE in COMMANDS
    (code,) = blocks("python")
    assert 'compile_model("models/digits.pt"' in code
    run_command(COMPILE, folder, seed="1")
    assert run(["-c", code], folder, seed="12345")
    for name in ("operator.safetensors", "model.onnx"):
        assert (folder / "digits.asap" / name).read_bytes() == (folder / "fast.asap" / name).read_bytes(), name
