"""Handles what differs by a model's format: how it is captured, what it is compared with, how it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from asapc.backends.base import Runner
from asapc.backends.eager.runner import EagerRunner
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.backends.onnxruntime.splicer import splice_onnx
from asapc.capturing.capture import capture_code, capture_exported, capture_onnx
from asapc.config import CompileConfig
from asapc.errors import OptionError
from asapc.loading.onnx.module import OnnxModel
from asapc.loading.pt2.program import ExportedModel
from asapc.types.artifacts import OnnxArtifact
from asapc.types.axes import parse_ranges
from asapc.types.graph import CapturedGraph
from asapc.types.model import LoadedModel
from asapc.types.options import EarlyStopRule
from asapc.types.samples import Samples
from asapc.types.site import Site


@dataclass(frozen=True, eq=False)
class Origin:
    """A model in the format that it came in; this class itself handles modules of Python."""

    loaded: LoadedModel

    def adapt(self, config: CompileConfig) -> CompileConfig:
        """Adapt options to a model of this format.

        Raises:
            OptionError: the format does not support one of them.
        """
        return config

    def capture(self, samples: Samples, early_stop: EarlyStopRule) -> CapturedGraph:
        """Capture the model as one graph with a dynamic batch; see `capturing.capture`."""
        return capture_code(self.loaded, samples, early_stop)

    def reference(self) -> Runner:
        """Return a runner of the model as it came, to compare with."""
        return EagerRunner(self.loaded.module)

    def write(
        self,
        graph: CapturedGraph,
        compiled: CapturedGraph,
        sites: Sequence[Site],
        modules: Mapping[str, nn.Module],
        path: Path,
        metadata: Mapping[str, str],
    ) -> OnnxArtifact:
        """Write a model with operators as ONNX.

        Args:
            graph: the model as it was captured.
            compiled: the same with the operators in it.
            sites: the sites in `graph`.
            modules: operators by the site's name.
            path: file to write; it appears whole or not at all.
            metadata: what the file says about its origin.

        Raises:
            BuildError: it cannot be written.
        """
        return export_onnx(compiled, path, metadata)


@dataclass(frozen=True, eq=False)
class Exported(Origin):
    """An archive of torch.export, which holds its graph."""

    loaded: ExportedModel

    def adapt(self, config: CompileConfig) -> CompileConfig:
        """Refuse open axes but the batch: a graph cannot be captured at other lengths than its own."""
        if any(name != "batch" for name, _, _ in parse_ranges(config.dynamic)):
            raise OptionError(
                f"{self.loaded.path} is an exported model, whose axes are as they were exported",
                "omit --dynamic, or compile the checkpoint with --model",
            )
        return config

    def capture(self, samples: Samples, early_stop: EarlyStopRule) -> CapturedGraph:
        """Return the graph of the archive."""
        return capture_exported(self.loaded, samples)


@dataclass(frozen=True, eq=False)
class OnnxFile(Origin):
    """An ONNX file, of which the loops alone are replaced."""

    loaded: OnnxModel

    def adapt(self, config: CompileConfig) -> CompileConfig:
        """Keep operators to standard ONNX, as the file does; refuse options that would change the rest of the file."""
        if config.precision != "float32" or config.dynamic or config.relu_activations or config.output_names:
            raise OptionError(
                "an ONNX file keeps its own precision, axes, activations and names",
                "compile the checkpoint that it was exported from, or omit --precision, --dynamic, "
                "--relu-activations and --output-names",
            )
        return replace(config, lowering="materialised")

    def capture(self, samples: Samples, early_stop: EarlyStopRule) -> CapturedGraph:
        """Capture the module that computes the file."""
        return capture_onnx(self.loaded, samples)

    def reference(self) -> Runner:
        """Return the file in ONNX Runtime."""
        return OnnxRuntimeRunner(self.loaded.path)

    def write(
        self,
        graph: CapturedGraph,
        compiled: CapturedGraph,
        sites: Sequence[Site],
        modules: Mapping[str, nn.Module],
        path: Path,
        metadata: Mapping[str, str],
    ) -> OnnxArtifact:
        """Put the operators into the file; the rest of it stays as it is, byte for byte."""
        return splice_onnx(self.loaded.module, graph, sites, modules, path, metadata)


def origin_of(loaded: LoadedModel) -> Origin:
    """Return the origin of a model, by its format."""
    match loaded:
        case ExportedModel():
            return Exported(loaded)
        case OnnxModel():
            return OnnxFile(loaded)
        case _:
            return Origin(loaded)
