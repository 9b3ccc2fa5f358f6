"""Inputs and outputs of a model in files of numpy."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from asapc.errors import SamplesError
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.zips import check_zip
from asapc.runtime.model import Model, load


def read_arrays(path: Path, model: Model) -> dict[str, np.ndarray]:
    """Read inputs from a .npz file, by their names, or the only input of a model from a .npy file.

    Raises:
        SamplesError: the file cannot be read, holds objects of Python, or is of another kind.
    """
    source = Source.at(path, SamplesError)
    if path.suffix == ".npy" and len(model.inputs) == 1:
        with source.reading():
            return {model.inputs[0].name: np.load(path, allow_pickle=False)}
    if path.suffix != ".npz":
        raise SamplesError(f"{path} is no .npz file", "save the inputs by name: numpy.savez(path, NAME=array)")
    with source.reading(), path.open("rb") as file:
        check_zip(file, source, compressed=True)
        file.seek(0)
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files if name != "labels"}


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays by their names into a .npz file, the same bytes for the same arrays."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():  # numpy.savez takes no array called "file"
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def run_files(folder: Path, inputs: Path, outputs: Path, device: str = "auto", threads: int = 0) -> str:
    """Run the model of a folder on the arrays of a file, as one batch, and write what it returns.

    Args:
        folder: what `asapc compile` wrote.
        inputs: .npz file of the inputs by name, or .npy of the only one.
        outputs: .npz file to write.
        device: as of `load`.
        threads: as of `load`.

    Returns:
        What was computed and where, in one line.

    Raises:
        AsapcError: as of `load`, `read_arrays` and `Model`.
    """
    with load(folder, device, threads) as model:
        results = model(read_arrays(inputs, model))
        write_arrays(outputs, results)
    shapes = ", ".join(f"{name} {array.shape}" for name, array in results.items())
    return f"{shapes}, {model.runtime} on {model.device}"
