"""The packages with NVIDIA's compilers, and what tells them apart.

`tensorrt` 10 and 11 build on the GPU that the engine is for, `tensorrt_rtx` ahead of time for GPUs that need not be
here. Networks are strongly typed in all of them: in 10 and TensorRT-RTX by a flag, in 11 always.
"""

import importlib
import re
from pathlib import Path
from typing import Any

from asapc.errors import BuildError

OLDEST = (10, 9)  # of `tensorrt`
NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


def open_package(name: str) -> Any:
    """Import `tensorrt` or `tensorrt_rtx`.

    Raises:
        BuildError: it does not load, or is too old.
    """
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError) as error:  # libraries of the wheel, or of the system, that do not load
        package = name.replace("_", "-")
        raise BuildError(f"{package} is installed, and cannot be loaded: {error}", f"reinstall {package}") from None
    found = re.match(r"(\d+)\.(\d+)", trt.__version__)
    if name == "tensorrt" and found and (int(found[1]), int(found[2])) < OLDEST:
        raise BuildError(
            f"TensorRT {trt.__version__} is installed, and is too old", "pip install 'tensorrt>={}.{}'".format(*OLDEST)
        )
    return trt


def architectures(trt: Any) -> list[str]:
    """Return the architectures that a package builds for ahead of time, none where it builds on the GPU alone."""
    capabilities = getattr(trt, "ComputeCapability", None)
    return [] if capabilities is None else [name for name in capabilities.__members__ if name.startswith("SM")]


def lacks(trt: Any) -> dict[str, str]:
    """Return the options that a package does not have, by flag, each with the reason."""
    if architectures(trt):
        return {
            "--timing-cache": "it measures no kernels while it builds",
            "--version-compatible": "its package has no lean runtime, which such an engine carries",
            "--hardware-compatible": "an engine of it runs on all architectures of --gpu-arch instead",
        }
    reasons = {"--gpu-arch": "it builds on the GPU that is here, for that one"}
    if not hasattr(trt.IBuilderConfig, "create_timing_cache"):
        reasons["--timing-cache"] = "this version has none"
    if not hasattr(trt.BuilderFlag, "VERSION_COMPATIBLE"):
        reasons["--version-compatible"] = "this version has no such flag"
    if not hasattr(trt, "HardwareCompatibilityLevel"):
        reasons["--hardware-compatible"] = "this version has no such level"
    return reasons


def strongly_typed(trt: Any) -> int:
    """Return the flags that make a network strongly typed, 0 where all networks are."""
    flag = getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def configure(trt: Any, config: Any, options: dict[str, Any]) -> None:
    """Apply options that `lacks` does not name to an IBuilderConfig; see `compiler.main` for what they hold."""
    # Only then is the log's list of layers complete.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace"])
    if options["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options["hardware_compatible"]:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def load_timings(config: Any, path: Path) -> str | None:
    """Give a config the kernels' times of a file, or none where they cannot be used; return a note on why not.

    Raises:
        OSError: the file cannot be read.
    """
    content = path.read_bytes() if path.exists() else b""
    try:
        if content and config.set_timing_cache(config.create_timing_cache(content), False):
            return None
    except (RuntimeError, TypeError, ValueError):  # what the bindings raise where the content gives no cache
        pass
    config.set_timing_cache(config.create_timing_cache(b""), False)
    if not content:
        return None
    return f"{path} is damaged, or of another GPU or version of TensorRT: kernels were measured anew"


def save_timings(config: Any, path: Path) -> None:
    """Write the kernels' times of a config into a file, which is there whole or as it was.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(bytes(config.get_timing_cache().serialize()))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
