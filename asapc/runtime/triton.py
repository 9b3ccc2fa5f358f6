"""A model of Triton's Python backend that runs what `asapc compile` wrote; a version's model.py imports it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asapc.errors import AsapcError
from asapc.runtime.model import load

MODEL = "model.asap"  # the compiled folder, in that of a version
Arrays = dict[str, np.ndarray]


class TritonPythonModel:
    """What the server calls: one object for each instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the folder of this version; `asapc.load` chooses the device."""
        version = Path(args["model_repository"]) / args["model_version"]
        self.model = load(version / MODEL)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, those of the same lengths as one batch."""
        triton = library()
        inputs = [
            {i.name: triton.get_input_tensor_by_name(r, i.name).as_numpy() for i in self.model.inputs} for r in requests
        ]
        groups: dict[Any, list[int]] = {}
        for position, arrays in enumerate(inputs):
            groups.setdefault(tuple(array.shape[1:] for array in arrays.values()), []).append(position)
        answers: list[Any] = [None] * len(requests)
        for positions in groups.values():
            for position, answer in zip(positions, self.answer([inputs[p] for p in positions]), strict=True):
                answers[position] = answer
        return answers

    def answer(self, inputs: Sequence[Arrays]) -> list[Any]:
        """Compute requests of the same lengths as one batch; each alone where that is refused."""
        if len(inputs) > 1:
            try:
                batch = self.model({name: np.concatenate([arrays[name] for arrays in inputs]) for name in inputs[0]})
            except AsapcError:
                return [answer for arrays in inputs for answer in self.answer([arrays])]
            ends = np.cumsum([len(next(iter(arrays.values()))) for arrays in inputs])[:-1]
            parts = zip(*(np.split(array, ends) for array in batch.values()), strict=True)
            return [response(dict(zip(batch, part, strict=True))) for part in parts]
        try:
            return [response(self.model(inputs[0]))]
        except AsapcError as error:
            triton = library()
            return [triton.InferenceResponse(error=triton.TritonError(f"{error}; {error.hint}"))]

    def finalize(self) -> None:
        """Let go of the model."""
        self.model.close()


def response(outputs: Arrays) -> Any:
    """Return outputs by name as the server takes them."""
    triton = library()
    return triton.InferenceResponse([triton.Tensor(name, array) for name, array in outputs.items()])


def library() -> Any:
    """Return the module that the server brings along, which exists in its processes only."""
    import triton_python_backend_utils  # type: ignore[import-not-found]

    return triton_python_backend_utils
