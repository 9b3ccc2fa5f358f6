"""Imports what may be broken in processes of their own, which may raise, crash or hang without harm to this one."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from asapc.errors import printable

MAX_SECONDS = 180  # torch takes half a minute from a cold disk

# It takes over the parent's import path, so that both see the same installation, and answers on its last line.
CHILD = """
import importlib, importlib.util, json, sys
sys.path[:] = json.loads(sys.argv[1])
name, code = sys.argv[2:4]
def absent():
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError as error:  # of the package around it
        return name.startswith(f"{error.name}.")
answer = {"installed": False}
try:
    if not absent():
        answer = {"installed": True}
        module = importlib.import_module(name)
        answer["version"] = getattr(module, "__version__", None)
        scope = {"module": module, "details": {}}
        exec(code, scope)
        answer["details"] = scope["details"]
except BaseException as error:
    text = " ".join(str(error).split())[:400]
    answer = {"installed": True, "error": f"{type(error).__name__}: {text}" if text else type(error).__name__}
print("\\n" + json.dumps(answer), flush=True)
"""

# What to find out about a module once it is imported.
TORCH = """
details["cuda"], details["gpus"], details["reason"] = module.version.cuda, 0, None
try:
    if module.cuda.is_available():
        details["gpus"] = module.cuda.device_count()
    elif module.version.cuda is not None:
        module.cuda.init()
except Exception as error:
    details["reason"] = " ".join(str(error).split())[:400]
"""
RUNTIME = """
details["session"] = hasattr(module, "InferenceSession")
details["providers"] = module.get_available_providers() if details["session"] else []
"""
TENSORRT = """
known = getattr(module, "ComputeCapability", None)
details["architectures"] = [] if known is None else [name for name in known.__members__ if name.startswith("SM")]
"""
MODULES = {
    "torch": TORCH,
    "onnx": "",
    "onnxruntime": RUNTIME,
    "tensorrt": TENSORRT,
    "tensorrt_rtx": TENSORRT,
    "cuda.bindings": "from cuda.bindings import driver",
}
COMPILER = "asapc.commands.compile"
# What compiling imports only where it needs it.
LATER = (
    "import jinja2, jsonschema, matplotlib, numpy, onnxscript, platformdirs, safetensors.torch, scipy.interpolate, "
    "scipy.optimize, scipy.stats"
)

# The driver by its own interface: it needs no package, and no nvidia-smi, which containers often lack.
CUDA = """
import ctypes, sys
cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
number, text = ctypes.c_int(), ctypes.create_string_buffer(256)
def attribute(which, device):
    cuda.cuDeviceGetAttribute(ctypes.byref(number), which, device)
    return number.value
if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
    details["cuda"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
code = cuda.cuInit(0)
details["code"], details["gpus"] = code, []
if code == 0 and cuda.cuDeviceGetCount(ctypes.byref(number)) == 0:
    for device in range(number.value):
        cuda.cuDeviceGetName(text, 256, device)
        size = ctypes.c_size_t()
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        architecture = f"SM{attribute(75, device)}{attribute(76, device)}"
        name = text.value.decode(errors="replace")
        details["gpus"].append({"name": name, "architecture": architecture, "memory": size.value})
"""


def probe(codes: Mapping[str, tuple[str, str]], seconds: float = MAX_SECONDS) -> dict[str, dict[str, Any]]:
    """Import modules, each in a process of its own, all at once.

    Args:
        codes: by a name for the answer, the module and code that puts what it finds into `details`.
        seconds: that all of them may take together.

    Returns:
        By name, the fields of `asapc.doctor.facts.Module`.
    """
    path = json.dumps(sys.path)
    processes: dict[str, subprocess.Popen[str]] = {}
    answers: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + seconds
    try:
        for name, (module, code) in codes.items():
            processes[name] = subprocess.Popen(
                [sys.executable, "-c", CHILD, path, module, code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        for name, process in processes.items():
            # Those behind one that hangs have long since answered, and need a moment to be read.
            answers[name] = answer(process, max(1.0, end - time.monotonic()), seconds)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
    return answers


def answer(process: "subprocess.Popen[str]", left: float, seconds: float) -> dict[str, Any]:
    """Wait for a process and return what it answers, or how it ended without an answer."""
    try:
        output, errors = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        return {"installed": True, "error": f"the import took more than {seconds:.0f} s"}
    try:
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        return {"installed": True, "error": f"the import ended its process ({end_of(process.returncode, errors)})"}
    if "error" in found:
        found["error"] = printable(found["error"])
    return found


def end_of(code: int, errors: str) -> str:
    """Return how a process ended, in a few words."""
    if code < 0:
        return signal.Signals(-code).name
    return printable((errors.strip().splitlines() or [f"exit code {code}"])[-1])
