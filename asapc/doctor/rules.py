"""What is wrong with a machine: each rule a function from the facts to findings, which knows nothing but the facts."""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from asapc.doctor.facts import Facts

Severity = Literal["fault", "warning", "remark"]
# Without these a compilation does not start. What else asapc requires builds engines, which it may do without.
ENGINES = ("tensorrt-rtx-cu12",)
NEEDED = ("torch", "onnx", "onnxruntime")
PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu12", "cuda.bindings": "cuda-bindings"}
GPU_EXTRAS = ("tensorrt", "gpu")
GIBIBYTE = 2**30
LITTLE, NONE = 2 * GIBIBYTE, GIBIBYTE // 10  # of disk: models of some size fail, and all do
ORT_TENSORRT = 10  # the major version that ONNX Runtime's provider is bound to, libnvinfer.so.10


@dataclass(frozen=True)
class Finding:
    """Something about a machine that its user should know.

    Attributes:
        rule: name of the rule.
        severity: "fault": asapc cannot compile here; "warning": it can, with less than there could be; "remark":
            nothing is wrong.
        message: what it is, in one line.
        commands: that mend it, in order, or show more about it; empty where there is none.
    """

    rule: str
    severity: Severity
    message: str
    commands: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """Return the finding for JSON."""
        return asdict(self)


def python_version(facts: Facts) -> Iterator[Finding]:
    """Python is outside of the range."""
    if not facts.python_fits:
        message = f"Python {facts.python} is not {facts.requires_python}"
        yield Finding("python-version", "fault", message, ("python3.11 -m venv .venv",))


def unknown_ranges(facts: Facts) -> Iterator[Finding]:
    """No metadata says what asapc requires."""
    if facts.metadata_error is not None:
        message = f"versions were not compared with what asapc requires: {facts.metadata_error}"
        yield Finding("unknown-ranges", "warning", message, ("pip install packaging", "pip install ."))


def missing_requirement(facts: Facts) -> Iterator[Finding]:
    """A package that asapc always needs is not installed."""
    for requirement in facts.requirements:
        if requirement.extra is not None or requirement.version is not None:
            continue
        if requirement.name.startswith("onnxruntime") and facts.runtimes:
            continue  # another build of it; see `other_runtime`
        severity: Severity = "warning" if requirement.name in ENGINES else "fault"
        message = f"{requirement.name} is not installed"
        yield Finding("missing-requirement", severity, message, (install(requirement.text),))


def version_outside_range(facts: Facts) -> Iterator[Finding]:
    """A package is older or newer than asapc requires."""
    for requirement in facts.requirements:
        if requirement.version is not None and not requirement.fits:
            bounds = requirement.text.removeprefix(requirement.name)
            message = f"{requirement.name} {requirement.version} is outside of what asapc asks for, {bounds}"
            yield Finding("version-outside-range", "warning", message, (install(requirement.text),))


def broken_import(facts: Facts) -> Iterator[Finding]:
    """A package is installed, and cannot be imported."""
    for name, module in facts.modules.items():
        if module.error is not None:
            package = PACKAGES.get(name, runtime(facts) if name == "onnxruntime" else name)
            severity: Severity = "fault" if name in NEEDED else "warning"
            message = f"{name} is installed, and cannot be imported: {module.error}"
            yield Finding("broken-import", severity, message, (reinstall(facts, package),))


def two_runtimes(facts: Facts) -> Iterator[Finding]:
    """Several builds of ONNX Runtime have written into one folder."""
    if len(facts.runtimes) > 1:
        names = " and ".join(facts.runtimes)
        message = f"{names} are both installed, and own the same module: whichever came last is imported"
        yield Finding("two-runtimes", "warning", message, clean_runtime(facts))


def emptied_runtime(facts: Facts) -> Iterator[Finding]:
    """One of two builds of ONNX Runtime was uninstalled, and took files of the other with it."""
    module = facts.modules["onnxruntime"]
    vanished = bool(facts.runtimes) and not module.installed
    if vanished or (module.works and not module.details.get("session")):
        message = "onnxruntime has lost its files, as happens when one of two builds of it is uninstalled"
        yield Finding("emptied-runtime", "fault", message, clean_runtime(facts))


def other_runtime(facts: Facts) -> Iterator[Finding]:
    """Another build of ONNX Runtime stands in for the one that asapc asks for."""
    package = runtime(facts)
    if facts.runtimes and package not in facts.runtimes:
        message = f"{facts.runtimes[0]} is installed in place of {package}"
        severity: Severity = "warning" if facts.gpus else "remark"
        yield Finding("other-runtime", severity, message, clean_runtime(facts))


def tensorrt_provider(facts: Facts) -> Iterator[Finding]:
    """ONNX Runtime's TensorRT provider is bound to another major version of TensorRT."""
    tensorrt = facts.modules["tensorrt"]
    providers = facts.modules["onnxruntime"].details.get("providers", ())
    if "TensorrtExecutionProvider" in providers and (major(tensorrt.version) or 0) > ORT_TENSORRT:
        message = (
            f"ONNX Runtime's TensorRT provider needs TensorRT {ORT_TENSORRT}, and this is {tensorrt.version}: "
            "asapc needs no such provider, other programs may"
        )
        yield Finding("tensorrt-provider", "warning", message, (install(f"tensorrt>=10.9,<{ORT_TENSORRT + 1}"),))


def torch_without_cuda(facts: Facts) -> Iterator[Finding]:
    """There is a GPU, and torch was built without CUDA."""
    torch = facts.modules["torch"]
    if facts.gpus and torch.works and torch.details.get("cuda") is None:
        message = f"torch {torch.version} is built without CUDA, and there is a GPU ({facts.gpus[0].name})"
        # PyPI carries builds with CUDA for Linux alone.
        index = (
            "https://pypi.org/simple" if facts.system.startswith("Linux") else "https://download.pytorch.org/whl/cu128"
        )
        version = (torch.version or "").partition("+")[0]
        command = f"pip install --force-reinstall --index-url {index} torch=={version}"
        yield Finding("torch-without-cuda", "warning", message, (command,))


def torch_without_gpu(facts: Facts) -> Iterator[Finding]:
    """There is a GPU, torch was built with CUDA, and does not see it."""
    torch = facts.modules["torch"]
    if facts.gpus and torch.works and torch.details.get("cuda") is not None and not torch.details.get("gpus"):
        reason = torch.details.get("reason") or "it does not say why"
        newest = facts.driver.cuda if facts.driver is not None else None
        message = f"torch is built with CUDA {torch.details['cuda']}, and sees no GPU: {reason}"
        if newest is not None:
            message += f" (the driver runs CUDA up to {newest})"
        yield Finding("torch-without-gpu", "warning", message, ("nvidia-smi",))


def silent_driver(facts: Facts) -> Iterator[Finding]:
    """The driver is installed, and CUDA does not start."""
    if facts.driver is not None and facts.driver.error is not None:
        message = f"NVIDIA's driver is installed, and CUDA does not start: {facts.driver.error}"
        yield Finding("silent-driver", "warning", message, ("nvidia-smi",))


def foreign_gpu(facts: Facts) -> Iterator[Finding]:
    """TensorRT-RTX has no code for a GPU, and TensorRT proper is not there."""
    known = facts.modules["tensorrt_rtx"].details.get("architectures", ())
    if not known or facts.modules["tensorrt"].works:
        return
    for gpu in dict.fromkeys((gpu.name, gpu.architecture) for gpu in facts.gpus):
        name, architecture = gpu
        if architecture is not None and architecture not in known:
            message = f"TensorRT-RTX builds no engine for {architecture} ({name}); TensorRT does"
            yield Finding("foreign-gpu", "warning", message, (install("asapc[tensorrt]"),))


def no_builder(facts: Facts) -> Iterator[Finding]:
    """No TensorRT is installed, where asapc does not ask for one."""
    packages = ("tensorrt", "tensorrt_rtx")
    if not any(facts.modules[name].installed for name in packages) and facts.requirement(ENGINES[0]) is None:
        message = f"no TensorRT comes with asapc on {facts.system}, so that no engine is built"
        if facts.gpus:
            yield Finding("no-builder", "warning", message, (install("asapc[tensorrt]"),))
        else:
            yield Finding("no-builder", "remark", message)


def missing_extra(facts: Facts) -> Iterator[Finding]:
    """An optional package is not installed, one that serves here."""
    for requirement in facts.requirements:
        extra = requirement.extra
        if extra is None or requirement.version is not None or (extra in GPU_EXTRAS and not facts.gpus):
            continue
        message = f"{requirement.name} is not installed, which is optional: asapc[{extra}]"
        yield Finding("missing-extra", "remark", message, (install(f"asapc[{extra}]"),))


def disk_space(facts: Facts) -> Iterator[Finding]:
    """A folder has little space, none, or cannot be written."""
    for folder in facts.folders:
        essential = folder.use == "temporary files"
        if not folder.writable:
            yield Finding(
                "disk-space",
                "fault" if essential else "warning",
                f"the folder for {folder.use} cannot be written: {folder.path}",
                ("export TMPDIR=DIR",) if essential else (),
            )
        elif folder.free is not None and folder.free < LITTLE:
            empty = essential and folder.free < NONE
            message = f"the folder for {folder.use} has {folder.free / GIBIBYTE:.1f} GiB left: {folder.path}"
            yield Finding("disk-space", "fault" if empty else "warning", message, (f"df -h {folder.path}",))


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    python_version,
    missing_requirement,
    emptied_runtime,
    broken_import,
    two_runtimes,
    version_outside_range,
    unknown_ranges,
    other_runtime,
    silent_driver,
    torch_without_cuda,
    torch_without_gpu,
    foreign_gpu,
    tensorrt_provider,
    no_builder,
    disk_space,
    missing_extra,
)


def diagnose(facts: Facts) -> tuple[Finding, ...]:
    """Return what is wrong, faults first; no remark on what a command above it already mends."""
    findings = [finding for rule in RULES for finding in rule(facts)]
    if facts.compiler.error is not None and not any(finding.severity == "fault" for finding in findings):
        message = f"asapc cannot be imported whole: {facts.compiler.error}"
        command = "pip install --force-reinstall asapc"
        findings.append(Finding("broken-compiler", "fault", message, (command,)))
    mends = {command for finding in findings if finding.severity != "remark" for command in finding.commands}
    findings = [finding for finding in findings if finding.severity != "remark" or not mends & set(finding.commands)]
    order = ("fault", "warning", "remark")
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))


def runtime(facts: Facts) -> str:
    """Return the build of ONNX Runtime that asapc asks for on this platform."""
    names = [requirement.name for requirement in facts.requirements if requirement.name.startswith("onnxruntime")]
    return (names or ["onnxruntime-gpu"])[0]


def clean_runtime(facts: Facts) -> tuple[str, ...]:
    """Return the commands that leave one whole build of ONNX Runtime."""
    requirement = facts.requirement(runtime(facts))
    text = runtime(facts) if requirement is None else requirement.text
    return (f"pip uninstall -y {' '.join(facts.runtimes)}", install(text))


def install(text: str) -> str:
    """Return the command that installs a requirement, quoted for shells where it has to be."""
    return f'pip install "{text}"' if re.search(r"[<>=\[!~]", text) else f"pip install {text}"


def reinstall(facts: Facts, package: str) -> str:
    """Return the command that installs a package again, within asapc's range."""
    requirement = facts.requirement(package)
    text = install(package if requirement is None else requirement.text)
    return text.replace("pip install", "pip install --force-reinstall --no-deps", 1)


def major(version: str | None) -> int | None:
    """Return the first number of a version."""
    found = re.match(r"\d+", version or "")
    return int(found[0]) if found else None
