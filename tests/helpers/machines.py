"""Facts of machines that are not here."""

from dataclasses import replace

from asapc.doctor.facts import Driver, Facts, Folder, Gpu, Module, Requirement

HOPPER = Gpu("NVIDIA H100 80GB HBM3", "SM90", 80 * 2**30)
ADA = Gpu("NVIDIA L4", "SM89", 24 * 2**30)
RTX = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
NONE = Module(False)
HEALTHY = Facts(
    asapc="0.1.0",
    system="Linux-x86_64",
    python="3.11.7",
    executable="/usr/bin/python",
    requires_python=">=3.11",
    python_fits=True,
    metadata_error=None,
    requirements=(
        Requirement("torch<2.14,>=2.13", "torch", version="2.13.0+cpu", fits=True),
        Requirement("onnxruntime-gpu>=1.22", "onnxruntime-gpu", version="1.31.1", fits=True),
        Requirement("tensorrt-rtx-cu12>=1.2", "tensorrt-rtx-cu12", version="1.7.1", fits=True),
        Requirement("tensorrt>=10.9", "tensorrt", extra="tensorrt"),
        Requirement("matplotlib>=3.8", "matplotlib", extra="plot", version="3.10", fits=True),
    ),
    modules={
        "torch": Module(True, "2.13.0+cpu", details={"cuda": None, "gpus": 0, "reason": None}),
        "onnx": Module(True, "1.23.2"),
        "onnxruntime": Module(True, "1.31.1", details={"session": True, "providers": list(PROVIDERS)}),
        "tensorrt": NONE,
        "tensorrt_rtx": Module(True, "1.7.1", details={"architectures": list(RTX)}),
        "cuda.bindings": Module(True, "13.5.0"),
    },
    runtimes=("onnxruntime-gpu",),
    compiler=Module(True, "0.1.0"),
    driver=None,
    gpus=(),
    folders=(Folder("temporary files", "/tmp", 50 * 2**30), Folder("output", "/home/user", 50 * 2**30)),
)
SEEING = Module(True, "2.13.0", details={"cuda": "12.8", "gpus": 1, "reason": None})


def with_modules(facts: Facts, **modules: Module) -> Facts:
    return replace(facts, modules={**facts.modules, **modules})


def with_gpu(*gpus: Gpu) -> Facts:
    """A healthy machine with GPUs that torch sees."""
    return replace(with_modules(HEALTHY, torch=SEEING), gpus=gpus, driver=Driver("570.86.15", "12.8"))


def without_requirement(facts: Facts, name: str) -> Facts:
    """Where the platform asks for no such package."""
    return replace(facts, requirements=tuple(r for r in facts.requirements if r.name != name))


def with_version(facts: Facts, name: str, version: str | None, fits: bool = False) -> Facts:
    changes = [replace(r, version=version, fits=fits) if r.name == name else r for r in facts.requirements]
    return replace(facts, requirements=tuple(changes))
