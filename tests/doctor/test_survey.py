"""What is collected about a machine: requirements, distributions, drivers, folders."""

import sys
from pathlib import Path

import pytest

from asapc.doctor import survey
from asapc.doctor.facts import Driver, Folder, Gpu, Requirement

METADATA = """Metadata-Version: 2.1
Name: {name}
Version: {version}
Requires-Python: >=3.9
Provides-Extra: more
Provides-Extra: dev
Requires-Dist: needed-of-test<3,>=2
Requires-Dist: elsewhere-of-test>=1; platform_system == "Nowhere"
Requires-Dist: missing-of-test>=1
Requires-Dist: extra-of-test>=5; extra == "more"
Requires-Dist: developer-of-test; extra == "dev"
"""
GPU_LINE = "NVIDIA H100 80GB HBM3, 9.0, 81559, 570.86.15"


def install(folder: Path, name: str, version: str, tops: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA.format(name=name, version=version))
    (info / "top_level.txt").write_text(tops)


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder for packages in front of all others."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def nvidia_smi(folder: Path, monkeypatch, code: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_requirements_are_those_of_the_installed_metadata_on_this_platform(site):
    install(site, "asker-of-test", "1.0")
    install(site, "needed-of-test", "3.1")
    install(site, "extra-of-test", "5.0+local")
    python, fits, requirements, error = survey.requirements_of("asker-of-test")
    assert (python, fits, error) == (">=3.9", True, None)
    assert requirements == (
        Requirement("needed-of-test<3,>=2", "needed-of-test", None, "3.1", False),
        Requirement("missing-of-test>=1", "missing-of-test", None, None, False),
        Requirement("extra-of-test>=5", "extra-of-test", "more", "5.0+local", True),
    )


def test_without_metadata_the_reason_is_kept():
    assert survey.requirements_of("no-such-distribution")[2:] == (
        (),
        "PackageNotFoundError: No package metadata was found for no-such-distribution",
    )


def test_without_packaging_the_reason_is_kept(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert "packaging.requirements" in survey.requirements_of("asapc")[3]


def test_all_distributions_of_one_module_are_found(site):
    install(site, "first-of-test", "1", "shared_of_test")
    install(site, "second-of-test", "1", "shared_of_test")
    install(site, "third-of-test", "1")
    found = survey.distributions("shared_of_test", ("third-of-test", "fourth-of-test"))
    assert found == ("first-of-test", "second-of-test", "third-of-test")


def test_the_driver_and_the_gpus_are_those_of_nvidia_smi(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, f"echo '{GPU_LINE}'; echo 'Odd, [N/A], [N/A], 570.86.15'")
    answer = {"installed": True, "details": {"cuda": "12.8", "code": 0, "gpus": []}}
    driver, gpus = survey.driver_and_gpus(answer)
    assert driver == Driver("570.86.15", "12.8")
    assert gpus == (Gpu("NVIDIA H100 80GB HBM3", "SM90", 81559 * 2**20), Gpu("Odd"))


@pytest.mark.parametrize("code", ["exit 9", "echo NVIDIA-SMI has failed; exit 9", "echo no, table"])
def test_without_nvidia_smi_they_are_those_of_cuda(tmp_path, monkeypatch, code):
    nvidia_smi(tmp_path, monkeypatch, code)
    gpu = {"name": "NVIDIA L4", "architecture": "SM89", "memory": 2**34}
    driver, gpus = survey.driver_and_gpus({"installed": True, "details": {"cuda": "12.8", "code": 0, "gpus": [gpu]}})
    assert (driver.cuda, driver.error, gpus) == ("12.8", None, (Gpu("NVIDIA L4", "SM89", 2**34),))


def test_an_nvidia_smi_that_fails_is_quoted_where_cuda_does_not_start_either(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, "echo NVIDIA-SMI has failed because it could not talk to the driver; exit 9")
    driver, gpus = survey.driver_and_gpus({"installed": True, "error": "OSError: none"})
    assert driver.error == "nvidia-smi fails: NVIDIA-SMI has failed because it could not talk to the driver"
    assert gpus == ()


def test_a_cuda_that_does_not_start_says_so(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, f"echo '{GPU_LINE}'")
    driver, gpus = survey.driver_and_gpus(
        {"installed": True, "details": {"cuda": "12.8", "code": 999, "gpus": []}, "version": None}
    )
    assert (driver.error, len(gpus)) == ("cuInit returns 999", 1)
    assert survey.driver_and_gpus({"installed": True, "error": "OSError: none"})[0].error == "OSError: none"


def test_a_folder_that_is_not_there_yet_is_measured_where_it_would_be(tmp_path):
    found = survey.folder("cache", tmp_path / "not" / "yet")
    assert found.path == str(tmp_path)
    assert found.free > 0
    assert found.writable


def test_a_machine_without_a_temporary_folder_is_described(monkeypatch):
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(survey.tempfile, "gettempdir", none)
    monkeypatch.setenv("TMPDIR", "/gone")
    assert Folder("temporary files", "/gone", 0, writable=False) in tuple(survey.folders())
