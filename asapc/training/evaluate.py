"""`asapc eval`: the accuracy of a checkpoint, or of what was compiled from it, on the same held-out samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from asapc.backends.base import Runner
from asapc.backends.eager.runner import EagerRunner
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.config import CompileConfig
from asapc.errors import CheckpointError, OptionError
from asapc.fidelity.outputs import accuracy, first_output
from asapc.loading.folder import read_folder
from asapc.loading.manifest import MODEL
from asapc.loading.model import load_model
from asapc.loading.teacher import load_teacher
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.tensors import read_torch
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples

MATCHES = "matches"  # what the labels of points are called in a checkpoint, beside its inputs: a match for each
TRAINED = "give a checkpoint of `asapc train`, or compare other models with `asapc verify`"


@dataclass(frozen=True)
class Evaluation:
    """How often a model is right.

    Attributes:
        model: the file or folder.
        runtime: what ran it.
        samples: how many were held out.
        accuracy: the share of samples, or of their points, whose label has the largest output.
    """

    model: Path
    runtime: str
    samples: int
    accuracy: float

    def data(self) -> dict[str, Any]:
        """Return what `asapc eval --json` prints."""
        return {
            "schema": "asapc.eval/1",
            "model": str(self.model),
            "runtime": self.runtime,
            "samples": self.samples,
            "metric": {"name": "accuracy", "value": self.accuracy},
        }


def evaluate(path: Path, teacher: Path | None = None) -> Evaluation:
    """Run a model on the held-out samples of its checkpoint.

    Args:
        path: a checkpoint of `asapc train`, or the folder that `asapc compile` wrote of one.
        teacher: of a folder the checkpoint; None for the path that its report names.

    Raises:
        CheckpointError: one of the files cannot be read, does not belong to the other, or has no held-out samples with
            labels.
        OptionError: a checkpoint is given a teacher.
    """
    if path.is_dir():
        loaded = load_teacher(path, read_folder(path), teacher, CompileConfig())
        runner: Runner = OnnxRuntimeRunner(path / MODEL)
    elif teacher is not None:
        raise OptionError("a checkpoint has no teacher: it holds the samples itself", "omit --teacher")
    else:
        try:
            loaded = load_model(path)
        except CheckpointError as error:  # whose hint is for models of any origin
            raise CheckpointError(str(error), TRAINED) from None
        runner = EagerRunner(loaded.module)
    samples = held_out(loaded)
    return Evaluation(path, runner.runtime, len(samples), score(runner, samples))


def score(runner: Runner, samples: Samples) -> float:
    """Return the share of labels that have the largest output.

    Raises:
        CheckpointError: there is no label for each output, or an output is no number.
    """
    outputs, labels = first_output(runner, samples), samples.labels
    if labels is None or labels.shape != outputs.shape[:-1]:
        raise CheckpointError("the labels of the held-out samples are not those of the model's outputs", "train again")
    if outputs.isnan().any():  # of which the largest would be the first
        raise CheckpointError(
            "the model's outputs on the held-out samples are not finite", "train with a smaller learning_rate"
        )
    return accuracy(outputs, labels)


def held_out(loaded: LoadedModel) -> Samples:
    """Return the held-out samples of a checkpoint, with their labels.

    Raises:
        CheckpointError: it has none.
    """
    samples = loaded.held_out
    labels = None if samples is None else samples.labels
    if samples is not None and labels is None:
        labels = read_torch(Source.at(loaded.path, CheckpointError))["held_out"].get(MATCHES)
    if samples is None or not isinstance(labels, Tensor) or not len(samples):
        raise CheckpointError(f"{loaded.path} holds no held-out samples with labels", TRAINED)
    return Samples(samples.inputs, labels)


def stored(samples: Samples) -> dict[str, Any]:
    """Return held-out samples as a checkpoint holds them, to be read by `held_out`."""
    labels = samples.labels
    name = "labels" if labels is not None and labels.dim() == 1 else MATCHES
    return {"inputs": dict(samples.inputs), name: labels}
