"""Builds the model that the user names with `--model package.module:factory`: the user's own, trusted code."""

import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from asapc.errors import OptionError
from asapc.loading.lines import remedy, told
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.texts import parse_json

MAX_ARGS_BYTES = 2**20  # of a JSON file of arguments; a configuration takes a few thousand


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Look for modules in the working directory first, as `python -m` does, and last from then on.

    The directory stays on the path because the model's code may import more when it runs. It comes last because a file
    that happens to lie there must not shadow what asapc itself imports later.
    """
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def build_model(name: str, args: str | Mapping[str, Any] | None) -> nn.Module:
    """Import a class or function by its name "package.module:factory" and call it.

    Args:
        name: of the factory; what follows the colon may be dotted.
        args: its keyword arguments, as JSON, the path of a JSON file, or a mapping.

    Raises:
        OptionError: there is no such module or attribute, or calling it with these arguments fails or does not return
            a module.
    """
    arguments = read_arguments(args)
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise OptionError(f"cannot read the model {name!r}", "use package.module:factory, e.g. my_models.vit:build")
    with working_directory_importable():
        factory = find_factory(module_name, attribute)
        call = f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())[:200]})"
        try:
            model = factory(**arguments)
        except (Exception, SystemExit) as error:
            raise OptionError(
                f"{call} raises {told(error)}", remedy(error, "give its arguments with --model-args, as JSON")
            ) from error
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"{call} returns a {type(model).__name__}, not a torch.nn.Module", "name the class, or a function"
        )
    if any(is_lazy(value) for value in [*model.parameters(), *model.buffers()]):
        raise OptionError(
            f"{call} has lazy modules, whose weights have no shape yet", "run the model once in the function"
        )
    if scripted := [name or "itself" for name, part in model.named_modules() if isinstance(part, ScriptModule)]:
        raise OptionError(
            f"{call} has modules of TorchScript, which torch.export cannot trace: {scripted[0]}",
            "build the model without torch.jit.script and torch.jit.trace",
        )
    return model


def call_of(name: str, args: str | Mapping[str, Any] | None) -> str:
    """Write the call of a factory with its arguments as JSON, the same for the same call; see `build_model`."""
    return json.dumps([name, read_arguments(args)], sort_keys=True, default=repr)


def find_factory(module_name: str, attribute: str) -> Any:
    """Return what a module holds under a dotted name, if it can be called."""
    try:
        value: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name)
        raise OptionError(
            f"there is no module {module_name}" if missing else f"importing {module_name} raises {told(error)}",
            "Python looks for modules in the working directory and on its own path",
        ) from error
    where = getattr(value, "__file__", None) or module_name
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise OptionError(f"{where} has no {attribute}", "name the class, or a function that returns it") from None
    if not callable(value):
        raise OptionError(f"{attribute} of {where} cannot be called", "name the class, or a function that returns it")
    return value


def read_arguments(args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Read the keyword arguments that an option holds.

    Raises:
        OptionError: the file cannot be read, is not JSON, or is not a JSON object.
    """
    if args is None or isinstance(args, Mapping):
        return dict(args or {})
    hint = """give a JSON object, e.g. '{"depth": 4}', or the path of a file with one"""
    text = args
    if not args.lstrip().startswith(("{", "[", '"')):
        if Source.at(Path(args), OptionError).size > MAX_ARGS_BYTES:
            raise OptionError(f"{args} is too long for a model's arguments", hint)
        try:
            text = Path(args).read_text()
        except UnicodeDecodeError:
            raise OptionError(f"{args} is not JSON", hint) from None
    try:
        arguments = parse_json(text)
    except ValueError as error:
        raise OptionError(f"cannot read the model's arguments {args[:80]!r}: {error}", hint) from None
    if not isinstance(arguments, dict):
        raise OptionError(f"the model's arguments {args[:80]!r} are not a JSON object", hint)
    return arguments
