"""The rules of `asapc doctor`, each on facts of a machine that it is about, and on one that it is not."""

from dataclasses import replace

import pytest
from helpers.machines import (
    ADA,
    HEALTHY,
    HOPPER,
    NONE,
    PROVIDERS,
    with_gpu,
    with_modules,
    with_version,
    without_requirement,
)

from asapc.doctor import Examination
from asapc.doctor.facts import Driver, Folder, Module
from asapc.doctor.rules import RULES, diagnose

RUNTIME_AGAIN = 'pip install "onnxruntime-gpu>=1.22"'
TENSORRT_11 = Module(True, "11.4.0", details={"architectures": []})
BROKEN = Module(True, "2.13.0", "OSError: libcudart.so.12: cannot open shared object file")
TWO = replace(HEALTHY, runtimes=("onnxruntime", "onnxruntime-gpu"))
EMPTY = with_modules(HEALTHY, onnxruntime=Module(True, details={"session": False, "providers": []}))
OLD_DRIVER = Module(True, "2.13.0", details={"cuda": "13.0", "gpus": 0, "reason": "the driver is too old"})
PLAIN = with_version(HEALTHY, "onnxruntime-gpu", None)


def rules(facts) -> list[tuple[str, str]]:
    return [(finding.rule, finding.severity) for finding in diagnose(facts)]


def folder(use: str, gibibytes: float, writable: bool = True) -> tuple[Folder, ...]:
    return (Folder(use, "/data", int(gibibytes * 2**30), writable),)


def test_a_healthy_machine_has_no_findings_and_is_ready():
    assert rules(HEALTHY) == []
    assert Examination(HEALTHY, diagnose(HEALTHY)).ready


CASES = {
    "old python": (replace(HEALTHY, python="3.10.2", python_fits=False), "python-version", "fault", ".venv"),
    "no torch": (
        with_modules(with_version(HEALTHY, "torch", None), torch=NONE),
        *("missing-requirement", "fault", 'pip install "torch<2.14,>=2.13"'),
    ),
    "no TensorRT-RTX": (
        with_modules(with_version(HEALTHY, "tensorrt-rtx-cu12", None), tensorrt_rtx=NONE),
        *("missing-requirement", "warning", 'pip install "tensorrt-rtx-cu12>=1.2"'),
    ),
    "newer torch": (with_version(HEALTHY, "torch", "2.15.0"), "version-outside-range", "warning", "<2.14"),
    "old TensorRT": (with_version(HEALTHY, "tensorrt", "10.1"), "version-outside-range", "warning", "tensorrt>=10.9"),
    "torch does not load": (
        with_modules(HEALTHY, torch=BROKEN),
        *("broken-import", "fault", 'pip install --force-reinstall --no-deps "torch<2.14,>=2.13"'),
    ),
    "TensorRT-RTX does not load": (
        with_modules(HEALTHY, tensorrt_rtx=BROKEN),
        *("broken-import", "warning", 'pip install --force-reinstall --no-deps "tensorrt-rtx-cu12>=1.2"'),
    ),
    "two runtimes": (TWO, "two-runtimes", "warning", "pip uninstall -y onnxruntime onnxruntime-gpu"),
    "no session": (EMPTY, "emptied-runtime", "fault", RUNTIME_AGAIN),
    "no module": (with_modules(HEALTHY, onnxruntime=NONE), "emptied-runtime", "fault", RUNTIME_AGAIN),
    "the plain runtime": (replace(PLAIN, runtimes=("onnxruntime",)), "other-runtime", "remark", RUNTIME_AGAIN),
    "TensorRT 11": (with_modules(HEALTHY, tensorrt=TENSORRT_11), "tensorrt-provider", "warning", "tensorrt>=10.9,<11"),
    "CPU build beside a GPU": (
        with_modules(with_gpu(ADA), torch=HEALTHY.modules["torch"]),
        *("torch-without-cuda", "warning", "--index-url https://pypi.org/simple torch==2.13.0"),
    ),
    "an old driver": (with_modules(with_gpu(ADA), torch=OLD_DRIVER), "torch-without-gpu", "warning", "nvidia-smi"),
    "CUDA does not start": (
        replace(HEALTHY, driver=Driver("570.86.15", "12.8", "cuInit returns 999")),
        *("silent-driver", "warning", "nvidia-smi"),
    ),
    "Hopper": (with_gpu(HOPPER), "foreign-gpu", "warning", 'pip install "asapc[tensorrt]"'),
    "little space": (replace(HEALTHY, folders=folder("temporary files", 1.5)), "disk-space", "warning", "df -h /data"),
    "no space": (replace(HEALTHY, folders=folder("temporary files", 0.01)), "disk-space", "fault", "df -h /data"),
    "no space for the cache": (replace(HEALTHY, folders=folder("cache", 0.01)), "disk-space", "warning", "df -h"),
    "no plots": (with_version(HEALTHY, "matplotlib", None), "missing-extra", "remark", 'pip install "asapc[plot]"'),
    "no metadata": (replace(HEALTHY, metadata_error="KeyError"), "unknown-ranges", "warning", "pip install packaging"),
    "scipy does not load": (replace(HEALTHY, compiler=BROKEN), "broken-compiler", "fault", "asapc"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_finds_its_case_says_how_bad_it_is_and_names_the_command(name):
    facts, rule, severity, command = CASES[name]
    examination = Examination(facts, diagnose(facts))
    found = [finding for finding in examination.findings if finding.rule == rule]
    assert [finding.severity for finding in found] == [severity]
    assert any(command in line for line in found[0].commands), found[0].commands
    assert examination.ready == (severity != "fault")
    assert "\n" not in found[0].message


def test_every_rule_has_a_case():
    names = {rule.__name__.replace("_", "-") for rule in RULES} | {"broken-compiler"}
    assert {rule for _, rule, _, _ in CASES.values()} == names - {"no-builder"}  # which has a test of its own


def test_a_known_gpu_needs_no_tensorrt_proper_and_misses_it_as_a_remark():
    assert rules(with_gpu(ADA)) == [("missing-extra", "remark")]


def test_tensorrt_proper_serves_hopper():
    facts = with_version(with_gpu(HOPPER), "tensorrt", "10.13", fits=True)
    assert rules(with_modules(facts, tensorrt=Module(True, "10.13"))) == []


def test_tensorrt_10_fits_the_provider_and_plain_providers_need_none():
    ten = Module(True, "10.13", details={"architectures": []})
    assert rules(with_modules(HEALTHY, tensorrt=ten)) == []
    plain = Module(True, "1.32", details={"session": True, "providers": PROVIDERS[-1:]})
    assert rules(with_modules(HEALTHY, tensorrt=TENSORRT_11, onnxruntime=plain)) == []


def test_where_no_builder_comes_with_asapc_its_absence_is_a_remark_and_beside_a_gpu_a_warning():
    facts = without_requirement(with_modules(HEALTHY, tensorrt_rtx=NONE), "tensorrt-rtx-cu12")
    assert rules(replace(facts, system="Darwin-arm64")) == [("no-builder", "remark")]
    beside = without_requirement(with_modules(with_gpu(HOPPER), tensorrt_rtx=NONE), "tensorrt-rtx-cu12")
    assert rules(beside) == [("no-builder", "warning")]


def test_there_is_no_remark_on_what_the_command_of_a_warning_installs():
    assert rules(with_gpu(HOPPER)) == [("foreign-gpu", "warning")]


def test_the_plain_runtime_beside_a_gpu_is_a_warning():
    facts = replace(with_version(with_gpu(ADA), "onnxruntime-gpu", None), runtimes=("onnxruntime",))
    assert ("other-runtime", "warning") in rules(facts)


def test_elsewhere_than_on_linux_torch_with_cuda_comes_from_its_own_index():
    facts = replace(with_modules(with_gpu(ADA), torch=HEALTHY.modules["torch"]), system="Windows-AMD64")
    (finding,) = (finding for finding in diagnose(facts) if finding.rule == "torch-without-cuda")
    assert "https://download.pytorch.org" in finding.commands[0]


def test_where_torch_does_not_load_nothing_is_said_of_its_build():
    assert rules(with_modules(with_gpu(ADA), torch=BROKEN)) == [("broken-import", "fault"), ("missing-extra", "remark")]


def test_faults_come_first():
    facts = replace(TWO, compiler=BROKEN)
    assert rules(facts) == [("broken-compiler", "fault"), ("two-runtimes", "warning")]


def test_a_folder_that_cannot_be_written_is_a_fault_only_where_nothing_can_replace_it():
    assert rules(replace(HEALTHY, folders=folder("temporary files", 50, writable=False))) == [("disk-space", "fault")]
    assert rules(replace(HEALTHY, folders=folder("output", 50, writable=False))) == [("disk-space", "warning")]
