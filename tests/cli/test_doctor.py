"""`asapc doctor`: the whole command, on this machine and on installations that are broken on purpose."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jsonschema
import pytest
from helpers.command import run
from helpers.machines import ADA, HEALTHY, HOPPER, with_gpu
from helpers.paths import ROOT

import asapc.doctor as module
from asapc.doctor import Examination, survey
from asapc.doctor.rules import diagnose
from asapc.doctor.showing import examination
from asapc.showing import Grid

SCHEMA = json.loads((ROOT / "docs" / "doctor.schema.json").read_text())
BLOCKER = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
"""


def broken(folder: Path, files: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a fresh interpreter that finds these modules before all others."""
    for name, code in files.items():
        path = folder / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(folder / "site"), str(ROOT), *([before] if before else [])])
    command = [sys.executable, "-m", "asapc", "doctor", *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def faults(result: "subprocess.CompletedProcess[str]") -> list[str]:
    assert (result.returncode, "Traceback" in result.stdout + result.stderr) == (1, False), result.stderr
    data = json.loads(result.stdout)
    jsonschema.validate(data, SCHEMA)
    assert not data["ready"]
    return [finding["message"] for finding in data["findings"] if finding["severity"] == "fault"]


def test_this_machine_can_compile_and_its_json_is_that_of_the_schema():
    result = run("doctor", "--json")
    data = json.loads(result.stdout)
    jsonschema.validate(data, SCHEMA)
    assert (result.exit_code, data["ready"], data["compiler"]["error"]) == (0, True, None)
    assert data["modules"]["onnxruntime"]["details"]["session"]
    assert [folder["use"] for folder in data["folders"]] == ["temporary files", "cache", "output"]


def test_the_schema_refuses_what_is_not_in_it():
    data = Examination(HEALTHY, ()).data()
    data = json.loads(json.dumps(data))
    jsonschema.validate(data, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "more": 1}, SCHEMA)


@pytest.mark.parametrize("facts", [HEALTHY, with_gpu(HOPPER), with_gpu(ADA)], ids=["cpu", "hopper", "ada"])
def test_the_table_fits_into_80_columns(monkeypatch, facts, tmp_path):
    folders = tuple(type(f)(f.use, f"{f.path}/{'long' * 30}", f.free) for f in facts.folders)
    facts = type(facts)(**{**vars(facts), "folders": folders})
    found = Examination(facts, diagnose(facts))
    monkeypatch.setattr(module, "examine", lambda: found)
    result = run("doctor")
    sentences = [part for part in examination(found) if not isinstance(part, Grid)]
    table = [line for line in result.stdout.splitlines() if line not in sentences]
    assert len(table) > 15
    assert max(map(len, table)) <= 80
    assert result.stdout.splitlines()[-1] == "asapc can compile here."
    assert all(sentence in result.stdout for sentence in sentences)


def test_it_works_where_nothing_that_compiles_can_be_imported(tmp_path):
    names = ("torch", "onnx", "onnxruntime", "numpy", "scipy", "tensorrt_rtx", "cuda", "platformdirs", "packaging")
    result = broken(tmp_path, {"sitecustomize.py": BLOCKER.format(names=names)})
    assert result.returncode == 1
    assert "fault: torch is installed, and cannot be imported: ImportError: torch is blocked" in result.stdout
    assert "fault: onnxruntime is installed, and cannot be imported" in result.stdout
    assert result.stdout.splitlines()[-1] == "asapc cannot compile here: mend the faults above first."
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("name", ["rich", "typer"])
def test_without_what_the_terminal_needs_a_line_says_so(name, tmp_path):
    result = broken(tmp_path, {"sitecustomize.py": BLOCKER.format(names=(name,))})
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"error: asapc cannot start: {name} is blocked",
        "hint: pip install --force-reinstall typer rich",
    ]


def test_a_torch_that_crashes_the_process_is_a_fault_with_the_signal(tmp_path):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    found = faults(broken(tmp_path, {"torch/__init__.py": crash}, "--json"))
    assert found == ["torch is installed, and cannot be imported: the import ended its process (SIGSEGV)"]


def test_an_onnxruntime_without_its_files_is_a_fault(tmp_path):
    (found,) = faults(broken(tmp_path, {"onnxruntime/__init__.py": ""}, "--json"))
    assert found.startswith("onnxruntime has lost its files")


def test_a_package_that_only_compiling_needs_is_missed(tmp_path):
    (found,) = faults(broken(tmp_path, {"scipy/__init__.py": "raise OSError('damaged')"}, "--json"))
    assert found == "asapc cannot be imported whole: OSError: damaged"


def test_a_machine_without_a_place_for_temporary_files_is_examined_all_the_same(monkeypatch):
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(survey, "probe", lambda codes: {name: {"installed": False} for name in codes})
    result = run("doctor", "--json")
    messages = [finding["message"] for finding in json.loads(result.stdout)["findings"]]
    assert (result.exit_code, result.stderr) == (1, "")
    assert any(message.startswith("the folder for temporary files cannot be written") for message in messages)
