"""Describes what a result depends on beside the model: versions and hardware."""

import importlib.metadata
import platform
from pathlib import Path

import torch

PACKAGES = (
    "asapc",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt-rtx-cu12",
    "tensorrt",
    "numpy",
)


def environment(seed: int) -> dict[str, object]:
    """Collect versions of Python and of the packages that matter, names of CPU and GPUs, and the seed."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "cpu": cpu_name(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "seed": seed,
    }


def version_of(package: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    if package == "asapc":  # in a bare checkout it has no metadata
        from asapc.version import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the marketing name of the CPU where the system reports it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
