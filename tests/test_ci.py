"""The CI files of docs/ci.md can be read, and the commands in them do what they say."""

import shlex
from pathlib import Path

import pytest
import yaml
from helpers.command import run
from helpers.documents import code_blocks
from helpers.paths import ROOT

from asapc.cli import app

PAGE = ROOT / "docs" / "ci.md"
FILES = [yaml.safe_load(text) for language, text in code_blocks(PAGE) if language == "yaml"]


def scripts() -> list[list[str]]:
    """The lines that each file runs."""
    github, gitlab = FILES
    steps = github["jobs"]["check"]["steps"]
    return [[step["run"] for step in steps if "run" in step], gitlab["check"]["script"]]


def commands(lines: list[str]) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in lines if line.startswith("asapc ")]


SHELL = [text.splitlines() for language, text in code_blocks(PAGE) if language == "sh"]


@pytest.mark.parametrize("lines", scripts(), ids=["GitHub", "GitLab"])
def test_a_ci_file_compiles_both_sides_and_checks_one_by_the_other(lines):
    base, head, check = commands(lines)
    assert (base[0], head[0], check[0]) == ("compile", "compile", "check")
    assert [base[-1], head[-1]] == ["base.asap", "head.asap"]
    assert check[1:4] == ["head.asap", "--relative", "base.asap"]


def test_artifacts_and_summaries_are_files_that_the_check_writes():
    github, gitlab = FILES
    steps = github["jobs"]["check"]["steps"]
    check = next(step["run"] for step in steps if step.get("run", "").startswith("asapc check"))
    (upload,) = (step["with"]["path"].split() for step in steps if "upload-artifact" in step.get("uses", ""))
    assert {"check.xml", "check.md"} <= set(shlex.split(check)) & set(upload)
    assert all(step["if"] == "always()" for step in steps[-2:])
    assert gitlab["check"]["artifacts"]["reports"]["junit"] in shlex.split(gitlab["check"]["script"][-1])


@pytest.mark.parametrize("arguments", [c for lines in (*scripts(), *SHELL) for c in commands(lines) if c[0] == "check"])
def test_a_check_of_the_page_runs(arguments, readme_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("main.asap", "head.asap", "base.asap"):
        Path(name).symlink_to(readme_folder / "digits.asap")
    # The latency itself is not what this is about: it is never stable enough in a moment.
    if "--baseline" in arguments or "--save-baseline" in arguments:
        assert run(*arguments, "--seconds", "0.1", "--batch", "1").exit_code in (0, 1, 6)
    else:
        assert run(*arguments).exit_code == 0
        assert all((tmp_path / name).exists() for name in arguments if name.endswith((".xml", ".md")))


def test_the_codes_of_the_page_are_those_of_the_command():
    assert "check" in {command.callback.__name__ for command in app.registered_commands}
    help_text = " ".join(run("check", "--help").stdout.split())
    for code in ("0 done", "3 fidelity", "4 slower", "5 not comparable", "6 latency not stable"):
        assert code in help_text
        assert f"\n| {code[0]} |" in PAGE.read_text()
