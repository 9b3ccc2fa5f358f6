"""The reference workload of a baseline: the model that it was taken of, with made-up weights in place of its own.

What slows a machine slows one workload more than another, by half as much again and more, so that times of two days can
be compared in units of the same work only.
"""

import base64
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from asapc.errors import CheckpointError
from asapc.loading.baseline import SAVE
from asapc.loading.untrusted.source import Source
from asapc.passes.onnx.weights import tensors, with_made_up_weights, without_weights

MAX_BYTES = 2**27  # of a model without its weights
MAX_WEIGHTS = 2**32  # values of all constants together


def pack_reference(path: Path) -> str:
    """Return an ONNX file's model without its weights, as the text that a baseline keeps."""
    model = without_weights(onnx.load(str(path)))
    return base64.b64encode(zlib.compress(model.SerializeToString(deterministic=True), 9)).decode()


def read_reference(text: str, source: Source) -> onnx.ModelProto:
    """Return a model with made-up weights, from what `pack_reference` returned or a stranger made.

    Raises:
        AsapcError: it is none, is longer than any such model, or reads other files.
    """
    try:
        unpack = zlib.decompressobj()
        content = unpack.decompress(base64.b64decode(text, validate=True), MAX_BYTES)
        model = onnx.load_model_from_string(content)
        constants = list(tensors(model))
        if not unpack.eof or sum(prod(tensor.dims) for tensor in constants) > MAX_WEIGHTS:
            raise source.refuse("its reference model is too large", SAVE)
        if any(tensor.external_data for tensor in constants):
            raise source.refuse("its reference model reads other files", SAVE)
        model = with_made_up_weights(model)
        onnx.checker.check_model(model)
    except (ValueError, TypeError, LookupError, zlib.error, DecodeError, onnx.checker.ValidationError):
        raise source.refuse("its reference model is damaged", SAVE) from None
    return model


@contextmanager
def reference_file(model: Path, path: Path | None, baseline: Mapping[str, Any] | None) -> Iterator[Path]:
    """Yield the ONNX file of the reference workload: of a baseline, or without one of the model to take one of."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reference.onnx"
        if baseline is None or path is None:
            reference = with_made_up_weights(without_weights(onnx.load(str(model))))
        else:
            reference = read_reference(baseline["reference"], Source.at(path, CheckpointError))
        onnx.save(reference, str(file), save_as_external_data=reference.ByteSize() > MAX_BYTES)
        yield file
