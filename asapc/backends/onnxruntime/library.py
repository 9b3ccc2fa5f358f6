"""Imports ONNX Runtime with its telemetry off."""

from typing import Any


def library() -> Any:
    """Return the module `onnxruntime`; `asapc/__init__.py` says how it starts without telemetry."""
    import onnxruntime

    # For a process that imported ONNX Runtime before asapc, when the environment came too late.
    onnxruntime.disable_telemetry_events()
    return onnxruntime
