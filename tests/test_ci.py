"""The CI files of docs/ci.md can be read, and the commands in them do what they say."""

import os
import shlex
import subprocess
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
    """The lines that each file runs, in the folder in which the repository, or its two checkouts, lie."""
    github, gitlab = FILES
    steps = [step for step in github["jobs"]["check"]["steps"] if "run" in step]
    lines = [f"(cd {step.get('working-directory', '.')} && {step['run']})" for step in steps]
    return [lines, gitlab["check"]["script"]]


def commands(lines: list[str]) -> list[list[str]]:
    parts = [part.strip("()") for line in lines for part in line.split(" && ")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("asapc ")]


SHELL = [text.splitlines() for language, text in code_blocks(PAGE) if language == "sh"]


# Stands for asapc: it notes which code it saw, and writes what the real one does.
PROGRAM = """#!/bin/bash
echo "$1 $(cat my_model.py 2>/dev/null)" >> "$LOG"
while [ $# -gt 0 ]; do
  case "$1" in
    --out) mkdir -p "$2" ;;
    --junit | --markdown) echo verdict > "$2" ;;
    --relative) [ -d "$2" ] && [ -d head.asap ] || exit 1 ;;
  esac
  shift
done
"""


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=tester", "-c", "user.email=tester@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with another model on each of two branches, main and change."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    for branch, code in (("main", "base code"), ("change", "head code")):
        git(folder, "switch", "-qC", branch)
        (folder / "my_model.py").write_text(code)
        git(folder, "add", ".")
        git(folder, "commit", "-qm", code)
    return folder


@pytest.mark.parametrize(("lines", "runs"), zip(scripts(), (1, 2), strict=True), ids=["GitHub", "GitLab"])
def test_a_ci_file_compiles_both_sides_and_checks_one_by_the_other(lines, runs, repository, tmp_path):
    work, programs, log = tmp_path / "work", tmp_path / "programs", tmp_path / "log"
    programs.mkdir()
    for name, text in (("asapc", PROGRAM), ("pip", "#!/bin/bash\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    # A runner of GitLab has of a request its own branch alone, and no history; one of GitHub makes the two checkouts.
    clone = ("clone", "-q", "--depth", "1", "--single-branch", repository.as_uri())
    for branch, folder in (("main", work / "base"), ("change", work / "head")) if runs == 1 else (("change", work),):
        git(tmp_path, *clone, "-b", branch, str(folder))
    summary = {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary"), "CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main"}
    own = {"PATH": f"{programs}:{os.environ['PATH']}", "LOG": str(log)}
    for _ in range(runs):  # a runner of GitLab keeps the clone, and removes what is not in it
        subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=work, env={**os.environ, **own, **summary}, check=True)
        if runs == 2:
            git(work, "clean", "-ffdxq")
    words = [line.split(" ", 1) for line in log.read_text().splitlines()]
    assert [code for verb, code in words if verb == "compile"] == ["base code", "head code"] * runs
    assert [verb for verb, _ in words] == ["compile", "compile", "check"] * runs
    assert runs == 2 or (tmp_path / "summary").read_text() == "verdict\n"


def test_what_the_ci_files_compile_is_the_model_of_the_readme():
    (own,) = (line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("asapc compile shapes"))
    own = own[: own.index(" --fidelity")]
    for lines in scripts():
        assert sum(own in line for line in lines) == 2


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
