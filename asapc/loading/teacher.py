"""Reads the model that a folder was compiled from again, as its report says."""

import hashlib
import hmac
import json
import os
import secrets
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor

from asapc.config import OPTIONS, CompileConfig
from asapc.errors import CheckpointError, OptionError
from asapc.hashes import add_tensor
from asapc.loading.factories import read_arguments
from asapc.loading.model import load_model
from asapc.loading.objects import hash_weights, is_object
from asapc.types.model import LoadedModel

# What says how a model is built, with the file of its weights.
BUILDING = ("model", "model_args", "weights")
KEY_BYTES = 32


def load_teacher(folder: Path, report: Mapping[str, Any], teacher: Path | None, config: CompileConfig) -> LoadedModel:
    """Read the model that a folder was compiled from.

    Args:
        folder: the compiled folder.
        report: its report.
        teacher: where the model is; None for the path that the report names.
        config: options that say how to read it; where they name no model, it is built as the report says.

    Raises:
        CheckpointError: it is not there, another model, or built by code that a folder from elsewhere names.
        OptionError: `unsafe_load` without a teacher, or no teacher where that was an object in Python.
    """
    if config.unsafe_load and teacher is None:
        raise OptionError("--unsafe-load would run a file that the folder names", "name it yourself, with --teacher")
    facts = report["model"]
    path, of_object = teacher or Path(facts["path"]), is_object(facts["path"])
    if teacher is None and of_object:
        raise OptionError(
            f"{folder} was compiled from an object in Python",
            "give its weights, saved by torch.save(model.state_dict(), FILE), with --teacher and --model, or --outputs",
        )
    if teacher is None and not path.exists():
        raise CheckpointError(
            f"the model that {folder} was compiled from is not at {path}",
            "run asapc from where it was compiled, or give its --teacher",
        )
    loaded = load_model(path, as_compiled(folder, facts, config))
    same_file = facts["sha256"] == (hash_weights(loaded.module) if of_object else loaded.sha256)
    if not same_file and (facts["weights_sha256"] is None or weights_sha256(loaded) != facts["weights_sha256"]):
        raise CheckpointError(f"{loaded.path} is not the model that {folder} was compiled from", "give its --teacher")
    return loaded


def as_compiled(folder: Path, facts: Mapping[str, Any], config: CompileConfig) -> CompileConfig:
    """Return options that build the model as it was built for the compilation, unless they say how themselves.

    Raises:
        CheckpointError: code would run that the folder names, and it was not compiled here.
    """
    rebuild = facts["rebuild"]
    if rebuild is None or config.model is not None:
        return config
    if not is_own(facts):
        words = [f"{OPTIONS[name].flag} {shlex.quote(text_of(rebuild[name]))}" for name in BUILDING if rebuild[name]]
        why = f"{folder} names code that builds its model, and was not compiled here"
        raise CheckpointError(why, f"if you trust that code, add {' '.join(words)}")
    given = {name: value for name in BUILDING if (value := getattr(config, name)) is not None}
    return replace(config, **rebuild | given)


def text_of(value: str | Mapping[str, Any]) -> str:
    """Return the value of an option as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def model_data(loaded: LoadedModel, config: CompileConfig) -> dict[str, Any]:
    """Return what a report says of the model: the file, what tells it from others, and how to build it again."""
    facts = {
        "path": str(loaded.path),
        "sha256": loaded.sha256,
        "weights_sha256": weights_sha256(loaded),
        "parameters": loaded.parameters,
        "rebuild": rebuild_data(config),
    }
    return {**facts, "signature": signature(facts, make=True)}


def rebuild_data(config: CompileConfig) -> dict[str, Any] | None:
    """Return the options that build a model, with the arguments that a file held; None where none are needed or kept.

    Arguments that JSON does not hold, which Python can give, are not kept.
    """
    if config.model is None:
        return None
    arguments = read_arguments(config.model_args)
    try:
        if json.loads(json.dumps(arguments, allow_nan=False)) != arguments:
            return None
    except (TypeError, ValueError):
        return None
    return {"model": config.model, "model_args": arguments, "weights": config.weights}


def weights_sha256(loaded: LoadedModel) -> str | None:
    """Hash the call that built a model, and name, dtype, shape and bytes of all its tensors.

    Returns:
        The hash, equal for files that hold the same weights in other ways; None where a file holds more of the model.
    """
    if loaded.call is None:
        return None
    digest = hashlib.sha256(f"{loaded.call}\n".encode())
    for name, value in sorted(loaded.module.state_dict().items()):
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            return None
        add_tensor(digest, name, value)
    return digest.hexdigest()


def is_own(facts: Mapping[str, Any]) -> bool:
    """Return whether asapc wrote what a report says of its model for this user, on this machine."""
    own = signature(facts)
    return own is not None and hmac.compare_digest(own, str(facts["signature"]))


def signature(facts: Mapping[str, Any], make: bool = False) -> str | None:
    """Sign how a model is built, with a key that the user's folders alone hold.

    A report names code, and a folder may come from strangers: what they wrote bears no such signature.

    Args:
        facts: what a report says of its model.
        make: whether to make a key where there is none.

    Returns:
        The signature; None where there is nothing to sign, or no key can be had.
    """
    if facts["rebuild"] is None or (key := own_key(make)) is None:
        return None
    content = json.dumps(facts["rebuild"], sort_keys=True).encode()
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def own_key(make: bool) -> bytes | None:
    """Return the user's key, None where there is none or it cannot be read or made."""
    path = platformdirs.user_state_path("asapc", appauthor=False) / "key"
    try:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(KEY_BYTES))
        content = path.read_bytes()
    except OSError:
        return None
    return content if len(content) == KEY_BYTES else None
