"""Opens compiled folders, for what measures them again: `bench` and `check`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast, get_args

import onnx
from torch import Tensor

from asapc.backends.base import Runner
from asapc.backends.onnxruntime.cuda import CudaRunner
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.errors import OptionError, SamplesError
from asapc.loading.folder import check_lengths, read_folder
from asapc.loading.inputs import as_exported, compare_types
from asapc.loading.manifest import HALF, MODEL
from asapc.loading.samples import load_samples
from asapc.types.model import InputType
from asapc.types.samples import Samples

Runtime = Literal["cpu", "cuda"]
HELD_OUT = "held_out.npz"


@dataclass(frozen=True)
class Folder:
    """What `asapc compile` wrote.

    Attributes:
        path: of the folder.
        report: its report.json.
    """

    path: Path
    report: Mapping[str, Any]

    @classmethod
    def at(cls, path: Path) -> "Folder":
        """Read and check a folder; see `read_folder` for what it raises."""
        return cls(path, read_folder(path))

    @property
    def model(self) -> Path:
        """Its ONNX file."""
        return self.path / MODEL

    def deployed(self, runtime: Runtime) -> Path:
        """Return the file that `asapc.load` runs there: on a GPU that in half precision, if there is one."""
        half = self.path / HALF
        return half if runtime == "cuda" and half.exists() else self.model

    @cached_property
    def inputs(self) -> Mapping[str, InputType]:
        """The model's inputs."""
        return OnnxRuntimeRunner(self.model, 1).inputs

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes at which it was measured when it was compiled."""
        return tuple(dict.fromkeys(run["batch"] for run in self.report["latency"]["runs"]))

    def samples(self, data: Path | None) -> Samples:
        """Return samples of a file, or else those that were held out when it was compiled.

        Raises:
            SamplesError: they do not fit the model, or none were kept.
        """
        samples = as_exported(self.held_out[0] if data is None else load_samples(data), self.inputs)
        self.fit(samples)
        return samples

    def fit(self, samples: Samples) -> None:
        """Raise SamplesError where samples are not what the model takes."""
        if self.inputs.keys() != samples.inputs.keys():
            arrays, names = ", ".join(samples.inputs), ", ".join(self.inputs)
            raise SamplesError(
                f"the samples hold {arrays}; the inputs of {self.model} are {names}", "name the arrays as the inputs"
            )
        compare_types(self.model, samples, self.inputs)
        check_lengths(self.path, samples)

    @cached_property
    def held_out(self) -> tuple[Samples, Samples]:
        """Samples that were held out, and what the teacher returned for them.

        Raises:
            SamplesError: none were kept.
        """
        if not (self.path / HELD_OUT).exists():
            raise SamplesError(
                f"{self.path} keeps no samples: it was compiled with --samples-in-folder 0", "give --data"
            )
        content = load_samples(self.path / HELD_OUT)
        parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for name, value in content.inputs.items():
            kind, _, rest = name.partition(".")
            parts[kind == "output"][rest] = value
        return Samples(parts[0], content.labels), Samples(parts[1])


def runtime_of(name: str) -> Runtime:
    """Return the runtime of a name.

    Raises:
        OptionError: there is none.
    """
    if name not in get_args(Runtime):
        raise OptionError(f"--runtime cannot be {name!r}", f"give {' or '.join(get_args(Runtime))}")
    return cast(Runtime, name)


def open_file(path: Path, runtime: Runtime, threads: int, inputs: Samples) -> Runner:
    """Open an ONNX file in a runtime; `inputs` are the batch that it runs there."""
    if runtime == "cuda":
        return CudaRunner(path, inputs)
    return OnnxRuntimeRunner(path, threads)


def graph_hash(path: Path) -> str:
    """Return the hash of what an ONNX file computes: of all but its names for nodes, its metadata and its producer."""
    model = onnx.load(str(path))
    for part in ("producer_name", "producer_version", "domain", "model_version", "doc_string", "metadata_props"):
        model.ClearField(part)
    functions = [model.graph, *model.functions]
    for function in functions:
        for part in ("name", "doc_string", "metadata_props"):
            if function is model.graph or part != "name":
                function.ClearField(part)
        for node in function.node:
            for part in ("name", "doc_string", "metadata_props"):
                node.ClearField(part)
        for value in getattr(function, "value_info", ()):
            value.ClearField("metadata_props")
    return sha256(model.SerializeToString(deterministic=True)).hexdigest()
