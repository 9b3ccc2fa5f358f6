"""Builds the model that the config.json of a folder describes, from the code of transformers alone."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asapc.errors import CheckpointError, DependencyError, OptionError, one_line
from asapc.loading.checkpoint import at_most
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.texts import read_json

CONFIG = "config.json"
# Settings that name code of others, or kernels to fetch.
FOREIGN = {
    "auto_map",
    "trust_remote_code",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
}
# Entries of the model for each in the files: tied weights are saved once. Buffers that are not saved, such as masks and
# tables of positions, may have more in a small model.
MAX_RATIO, MAX_UNSAVED = 4, 2**26
# In the names of settings that count what transformers lists before it builds anything, and what they may be at most:
# ImageNet has 21,843 labels, and no model as many layers.
COUNTED, MAX_COUNT = ("layer", "label", "depth", "block"), 2**16
BY_HAND = "name the class or function that builds the model: --model package.module:factory"


def build_described(folder: Path, weights: Mapping[str, Any]) -> tuple[str, nn.Module] | None:
    """Build the model that a folder's config.json describes.

    Args:
        folder: of a library of Hugging Face.
        weights: the tensors of its files; a model far larger than these is not built.

    Returns:
        The name of its class and the model with random weights, or None where the folder describes no model of
        transformers.

    Raises:
        CheckpointError: transformers cannot build it, or it is far larger than its weights.
        DependencyError: transformers is not installed.
        OptionError: transformers knows no such model.
    """
    path = folder / CONFIG
    if not path.exists():
        return None
    source = Source.at(path, CheckpointError)
    config = read_json(source)
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or not names or not isinstance(config.get("model_type"), str):
        return None  # diffusers', or somebody's own
    name = names[0]
    with offline(source) as transformers:
        kind = find_class(transformers, source, name)
        try:
            check_counts(source, config)
            settings = kind.config_class.from_dict(without_foreign(config))
            entries = sum(value.numel() for value in weights.values() if isinstance(value, Tensor))
            with torch.device("meta"), at_most(MAX_RATIO * len(weights) + 100):
                model = kind(settings)
            size = sum(value.numel() for value in model.state_dict().values())
            buffers = sum(value.numel() for value in model.buffers())
            if size > MAX_RATIO * entries or buffers > MAX_RATIO * entries + MAX_UNSAVED:
                raise source.refuse(
                    f"it describes a model of {max(size, buffers):,} numbers, and the files hold {entries:,}"
                )
            return name, kind(settings)
        except CheckpointError:
            raise
        except Exception as error:
            raise source.refuse(f"transformers cannot build {name}: {one_line(error)}", BY_HAND) from error


def find_class(transformers: Any, source: Source, name: Any) -> Any:
    """Return the class of a model that transformers has under a name."""
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    raise OptionError(
        f"{source} names {str(name)[:80]!r}, which transformers {transformers.__version__} lacks", BY_HAND
    )


@contextmanager
def offline(source: Source) -> Iterator[Any]:
    """Yield transformers, which meanwhile fetches nothing and prints nothing.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import transformers
        from huggingface_hub import constants
    except ImportError as error:
        raise DependencyError(
            f"{source} names a model of transformers, which cannot be imported: {one_line(error)}",
            'pip install "asapc[transformers]", or ' + BY_HAND,
        ) from error
    before, verbosity = constants.HF_HUB_OFFLINE, transformers.logging.get_verbosity()
    constants.HF_HUB_OFFLINE = True
    transformers.logging.set_verbosity(logging.CRITICAL)  # what matters, it raises
    try:
        yield transformers
    finally:
        constants.HF_HUB_OFFLINE = before
        transformers.logging.set_verbosity(verbosity)


def check_counts(source: Source, config: Any) -> None:
    """Raise CheckpointError where a configuration, at any depth, counts more layers or labels than any model has."""
    entries: Iterable[tuple[Any, Any]] = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in entries:
        if isinstance(value, dict | list):
            check_counts(source, value)
        elif isinstance(value, int) and value > MAX_COUNT and any(part in str(key) for part in COUNTED):
            raise source.refuse(f"its {str(key)[:80]} is {value:,}, more than any model has")


def without_foreign(config: Any) -> Any:
    """Return a configuration without what names code of others, at any depth."""
    if isinstance(config, dict):
        return {key: without_foreign(value) for key, value in config.items() if key not in FOREIGN}
    return [without_foreign(item) for item in config] if isinstance(config, list) else config
