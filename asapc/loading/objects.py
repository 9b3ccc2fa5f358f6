"""Models and samples that are objects in memory: modules of torch, tensors, arrays, loaders of batches."""

import copy
import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from asapc.errors import CheckpointError, OptionError, SamplesError, one_line
from asapc.hashes import add_value
from asapc.loading.model import unwrapped
from asapc.loading.samples import ONE_ARRAY_EACH, UNNAMED, as_samples, is_class_index, load_samples
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples

LABEL = "the samples"  # begins messages about them
WAYS = (
    "give a tensor or numpy array, a tuple of them, a dict by the names of the forward's parameters, an iterable of "
    "batches of these, or the path of a file"
)


def load_object(model: nn.Module) -> LoadedModel:
    """Return a copy of a module, on the CPU and in evaluation mode, as a file would give it.

    Raises:
        CheckpointError: it cannot be copied, has no weights yet, or weights that are not finite.
        OptionError: it is no module.
    """
    if not isinstance(model, nn.Module):
        hint = "build the model and call its load_state_dict" if isinstance(model, Mapping) else "give such an object"
        raise OptionError(f"this takes a torch.nn.Module or the path of a file, not a {type(model).__name__}", hint)
    model = unwrapped(model)
    name = f"<{type(model).__name__}>"
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(value) or value.is_meta:
            raise CheckpointError(f"{name} has no values for {key} yet", "load its weights, and run it once")
        if value.is_floating_point() and not value.isfinite().all() and isinstance(value, nn.Parameter):
            raise CheckpointError(f"{name}: {key} holds NaN or infinity", "give trained weights")
    try:
        module = copy.deepcopy(model)
    except Exception as error:  # whatever a model's own attributes raise
        raise CheckpointError(
            f"{name} cannot be copied: {one_line(error)}",
            "keep no results of its forward as attributes, or save its state_dict and compile that file with --model",
        ) from error
    module = module.cpu().eval()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return LoadedModel(module, Path(name), hash_weights(module), parameters, None, None)


def is_object(path: str) -> bool:
    """Return whether a report names as the path of its model an object in memory."""
    return path.startswith("<")


def hash_weights(module: nn.Module) -> str:
    """Return the SHA-256 of a module's state dict: of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        add_value(digest, name, value)
    return digest.hexdigest()


def read_samples(samples: Any, loaded: LoadedModel, most: int) -> Samples:
    """Return samples from whatever holds them, with labels where a batch is (inputs, labels).

    Args:
        samples: a tensor or array for a model of one input; a tuple of them, in the order of the forward's parameters;
            a dict by their names; an iterable of such batches, as a DataLoader, of which a bounded part is read; the
            path of a file.
        loaded: the model, whose forward tells inputs from labels.
        most: samples to read from an iterable.

    Raises:
        SamplesError: it is none of these, or may be read in two ways.
    """
    if isinstance(samples, Samples):
        return samples
    if isinstance(samples, str | Path):
        return load_samples(Path(samples))
    if is_array(samples) or isinstance(samples, Mapping | tuple):
        return as_samples(read_batch(samples, loaded), LABEL)
    if isinstance(samples, Dataset) and not isinstance(samples, IterableDataset):
        raise SamplesError(
            f"{LABEL} are a {type(samples).__name__}, which gives single samples",
            "give batches: torch.utils.data.DataLoader(dataset, batch_size=32)",
        )
    if not isinstance(samples, Iterable):
        raise SamplesError(f"{LABEL} are a {type(samples).__name__}", WAYS)
    return joined(samples, loaded, most)


def joined(batches: Iterable[Any], loaded: LoadedModel, most: int) -> Samples:
    """Join batches up to a number of samples.

    Raises:
        SamplesError: there are none, or they differ.
    """
    parts: list[Samples] = []
    count = 0
    for batch in batches:
        part = as_samples(read_batch(batch, loaded), f"batch {len(parts)} of {LABEL}")
        if parts and facts(part) != facts(parts[0]):
            raise SamplesError(
                f"batch {len(parts)} of {LABEL} holds {facts(part)}, the first {facts(parts[0])}",
                "give all batches the same inputs; pad sequences to one length",
            )
        parts.append(part[: most - count])
        count += len(parts[-1])
        if count >= most:
            break
    if not parts:
        raise SamplesError(f"{LABEL} are empty", "give an iterable that was not used up, with at least one batch")
    inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}
    labels = [part.labels for part in parts if part.labels is not None]
    return Samples(inputs, torch.cat(labels) if labels else None)


def facts(samples: Samples) -> str:
    """Return in words what two batches of the same samples have in common."""
    arrays = samples.inputs if samples.labels is None else {**samples.inputs, "labels": samples.labels}
    return ", ".join(
        f"{name or 'an array'} {tuple(value.shape[1:])} {str(value.dtype).removeprefix('torch.')}"
        for name, value in arrays.items()
    )


def read_batch(batch: Any, loaded: LoadedModel) -> dict[str, Any]:
    """Return the inputs of a batch by name, and its labels, as `as_samples` takes them.

    Raises:
        SamplesError: it is no batch, or may be read in two ways.
    """
    if is_array(batch):
        return {"inputs": {UNNAMED: as_tensor(batch)}}
    if isinstance(batch, Mapping):
        arrays = {str(name): as_tensor(value) for name, value in batch.items() if value is not None}
        labels = arrays.pop("labels", None)
        return {"inputs": arrays, "labels": labels}
    if not isinstance(batch, Sequence) or isinstance(batch, str) or not batch:
        raise SamplesError(f"a batch of {LABEL} is a {type(batch).__name__}", WAYS)
    first, *others = batch
    if not is_array(first):  # ({"x": x, "mask": mask}, labels) or ((x, mask), labels)
        if len(others) != 1 or not is_array(others[0]):
            raise SamplesError(f"a batch of {LABEL} begins with a {type(first).__name__}", WAYS)
        return {"inputs": read_inputs(first, loaded), "labels": as_tensor(others[0])}
    return by_position([as_tensor(value) for value in batch], loaded)


def read_inputs(inputs: Any, loaded: LoadedModel) -> dict[str, Tensor]:
    """Return the inputs of a batch whose labels stand apart."""
    if isinstance(inputs, Mapping):
        return {str(name): as_tensor(value) for name, value in inputs.items()}
    if isinstance(inputs, Sequence) and all(is_array(value) for value in inputs):
        return dict(zip(positional(loaded, len(inputs)), map(as_tensor, inputs), strict=False))
    raise SamplesError(f"a batch of {LABEL} begins with a {type(inputs).__name__}", WAYS)


def by_position(arrays: list[Tensor], loaded: LoadedModel) -> dict[str, Any]:
    """Name the arrays of a tuple as the parameters of a forward; the last may be labels.

    Raises:
        SamplesError: the forward takes neither as many nor one fewer, or both and the last may be labels.
    """
    names = positional(loaded, len(arrays))
    required = len(names) if loaded.inputs is not None else sum(p.default is p.empty for p in parameters_of(loaded))
    as_inputs = required <= len(arrays) <= len(names)
    with_labels = required <= len(arrays) - 1 <= len(names) and len(arrays) > 1 and is_class_index(arrays[-1])
    if as_inputs and with_labels:
        raise SamplesError(
            f"the last array of a batch may be the input {names[len(arrays) - 1]} or labels",
            'give a dict: {"' + f'{names[0]}": ..., "labels": ...' + "}",
        )
    if as_inputs:
        return {"inputs": dict(zip(names, arrays, strict=False))}
    if with_labels:
        return {"inputs": dict(zip(names, arrays[:-1], strict=False)), "labels": arrays[-1]}
    raise SamplesError(
        f"a batch of {LABEL} has {len(arrays)} arrays; the forward takes {', '.join(names) or 'none by position'}",
        f"{ONE_ARRAY_EACH}; class indices may follow as labels, but no other targets",
    )


def positional(loaded: LoadedModel, count: int) -> list[str]:
    """Return the names of the parameters that a forward takes by position; `count` are enough of a `*args`."""
    if loaded.inputs is not None:
        return list(loaded.inputs)
    names = [p.name for p in parameters_of(loaded)]
    parameters = inspect.signature(loaded.module.forward).parameters.values()
    many = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    return names + [f"input_{i}" for i in range(len(names), count)] if many else names


def parameters_of(loaded: LoadedModel) -> list[inspect.Parameter]:
    """Return the parameters that a forward takes by position, less `*args`."""
    parameters = inspect.signature(loaded.module.forward).parameters.values()
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def is_array(value: Any) -> bool:
    """Return whether a value is a tensor or an array of numpy."""
    return isinstance(value, Tensor | np.ndarray)


def as_tensor(value: Any) -> Tensor:
    """Return a tensor on the CPU, without a gradient, of a tensor or an array.

    Raises:
        SamplesError: it is neither, or holds no numbers, or not as a dense array, or some of it is masked.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise SamplesError(f"{LABEL} hold a tensor of {kind}", "give dense tensors that hold values")
        return value.detach().cpu()
    if np.ma.is_masked(value):  # torch would take what is under the mask
        raise SamplesError(f"{LABEL} hold an array with masked entries", "fill them: ARRAY.filled(VALUE)")
    try:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(value)).clone()
    except TypeError:
        raise SamplesError(
            f"{LABEL} hold an array of {value.dtype}", "give numbers that torch has a dtype for"
        ) from None
    raise SamplesError(f"{LABEL} hold a {type(value).__name__} where an array belongs", WAYS)
