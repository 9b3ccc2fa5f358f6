"""Gathers the samples that probe, calibrate and check a model."""

from pathlib import Path

import torch

from asapc.config import CompileConfig
from asapc.errors import SamplesError
from asapc.loading.inputs import order_inputs, shape_options
from asapc.loading.samples import load_samples
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples

MIN_CALIBRATION, MIN_HELD_OUT = 8, 4
HELD_OUT_SHARE = 4  # of the samples of a --calib file, one in four is held out


def probe_samples(loaded: LoadedModel, config: CompileConfig) -> Samples:
    """Return the inputs to probe a model with: those of --calib, else example inputs, else samples of the checkpoint.

    Raises:
        SamplesError: there are none, or they do not fit the model.
    """
    if config.calib is None and loaded.example is not None:
        return order_inputs(loaded, loaded.example)
    if config.calib is None and loaded.calibration is None:
        raise SamplesError(
            f"{loaded.path} carries no samples",
            f"give inputs with --calib or --inputs file.npz, or their shapes with {shape_options(loaded)}",
        )
    return gather_samples(loaded, config)[0]


def gather_samples(loaded: LoadedModel, config: CompileConfig) -> tuple[Samples, Samples]:
    """Return calibration and held-out samples: those of the --calib file if there is one, else of the checkpoint.

    A --calib file is shuffled with the seed, and a quarter of it is held out.

    Raises:
        SamplesError: there are none, too few, or they do not fit the model.
    """
    if config.calib is not None:
        return split_samples(loaded, load_samples(Path(config.calib)), str(config.calib), config.seed)
    if loaded.calibration is None or loaded.held_out is None:
        raise SamplesError(
            f"{loaded.path} carries no calibration samples",
            "give real inputs with --calib file.npz; asapc never makes up random ones",
        )
    return order_parts(loaded, loaded.calibration, loaded.held_out)


def split_samples(loaded: LoadedModel, samples: Samples, label: str, seed: int) -> tuple[Samples, Samples]:
    """Shuffle samples with a seed and hold a quarter out.

    Raises:
        SamplesError: they are too few, or do not fit the model; `label` begins the message.
    """
    compare_kinds(label, samples, loaded.calibration)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    shuffled = samples[order.tolist()]
    split = len(samples) // HELD_OUT_SHARE
    return order_parts(loaded, shuffled[split:], shuffled[:split])


def order_parts(loaded: LoadedModel, calibration: Samples, held_out: Samples) -> tuple[Samples, Samples]:
    """Put both in the order of the model's inputs.

    Raises:
        SamplesError: they are too few, do not fit the model, or each other.
    """
    if len(calibration) < MIN_CALIBRATION or len(held_out) < MIN_HELD_OUT:
        raise SamplesError(
            f"{len(calibration)} calibration and {len(held_out)} held-out samples are too few",
            f"give at least {HELD_OUT_SHARE * MIN_HELD_OUT} samples; 64 or more are better",
        )
    calibration, held_out = order_inputs(loaded, calibration), order_inputs(loaded, held_out)
    if calibration.inputs.keys() != held_out.inputs.keys():
        raise SamplesError(
            f"calibration samples hold {', '.join(calibration.inputs)}, held-out ones {', '.join(held_out.inputs)}",
            "give both the same inputs, or all samples with --calib",
        )
    return calibration, held_out


def compare_kinds(label: str, samples: Samples, reference: Samples | None) -> None:
    """Raise SamplesError where samples differ in shape or dtype from those that the checkpoint carries, if any."""
    for name, value in samples.inputs.items():
        expected = reference.inputs.get(name) if reference else None
        if expected is None:
            continue
        # numpy's default is float64, which `order_inputs` casts.
        cast = (value.dtype, expected.dtype) == (torch.float64, torch.float32)
        if value.shape[1:] != expected.shape[1:] or not (cast or value.dtype == expected.dtype):
            raise SamplesError(
                f"{label}: {name} is {tuple(value.shape)} {value.dtype}, the model was trained on "
                f"(samples, {', '.join(map(str, expected.shape[1:]))}) {expected.dtype}",
                "give samples of the shape and dtype that the model was trained on",
            )
