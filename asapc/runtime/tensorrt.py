"""Runs the TensorRT engine of a folder on the GPU that it was built for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asapc.backends.tensorrt.engine import Engine
from asapc.backends.tensorrt.loader import open_checked
from asapc.errors import AsapcError
from asapc.loading.manifest import read_checked
from asapc.runtime.session import Unavailable

ENGINE, REPORT = "model.engine", "report.json"


class EngineSession:
    """An engine as the runtime asks for it; of more samples than it takes at once in parts."""

    def __init__(self, engine: Engine, outputs: list[str]) -> None:
        self.engine, self.outputs = engine, outputs
        self.runtime, self.device = engine.runtime, engine.device

    def run(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Return the outputs; see `Session`."""
        own = {name: inputs[name] for name in self.engine.inputs}  # of the model's some may be unused
        results = self.engine.run_in_parts(own)
        return [results[name] for name in self.outputs]


def open_tensorrt(folder: Path, manifest: Mapping[str, Any], threads: int) -> EngineSession:
    """Open the engine of a folder whose files were checked.

    Raises:
        Unavailable: it holds none, or one that cannot run here.
    """
    if ENGINE not in manifest["files"]:
        raise Unavailable("the folder holds no engine")
    try:
        engine = open_checked(folder, read_checked(folder / REPORT))
    except AsapcError as error:
        raise Unavailable(str(error)) from error
    return EngineSession(engine, [output["name"] for output in manifest["outputs"]])
