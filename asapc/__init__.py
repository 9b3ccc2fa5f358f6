"""asapc: the compiler for doubly-stochastic attention."""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asapc.config import CompileConfig
from asapc.errors import AsapcError
from asapc.version import __version__

# As soon as its library is loaded, ONNX Runtime looks up a host for telemetry and writes an id of the device under the
# user's cache. Set before anything can load it, and inherited by processes that asapc starts.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# In a checkout passes/, models/ and cli.py stand beside this package, in a wheel inside it. This lets a
# checkout find them under the names they have once installed; a wheel never takes this branch.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "passes").is_dir():
    __path__.append(str(_checkout))

if TYPE_CHECKING:
    from asapc.commands.accelerate import accelerate
    from asapc.commands.objects import compile
    from asapc.commands.tradeoffs import tradeoffs
    from asapc.loading.model import load_model as load_checkpoint
    from asapc.runtime.model import load
    from asapc.writing.report import CompileReport

__all__ = [
    "AsapcError",
    "CompileConfig",
    "CompileReport",
    "__version__",
    "accelerate",
    "compile",
    "load",
    "load_checkpoint",
    "tradeoffs",
]

# These import torch, which takes seconds: on first use only.
_LAZY = {
    "CompileReport": ("asapc.writing.report", "CompileReport"),
    "accelerate": ("asapc.commands.accelerate", "accelerate"),
    "compile": ("asapc.commands.objects", "compile"),
    "load": ("asapc.runtime.model", "load"),
    "load_checkpoint": ("asapc.loading.model", "load_model"),
    "tradeoffs": ("asapc.commands.tradeoffs", "tradeoffs"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'asapc' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
