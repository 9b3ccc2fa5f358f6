"""What was asked for: the options of a compilation as data, and as a command that asks for the same again."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asapc.config import OPTIONS, CompileConfig
from asapc.types.options import Option


def options_data(config: CompileConfig, out: Path, threads: int) -> dict[str, Any]:
    """Return all options under the names that they have in a file for `--config`, defaults filled in."""
    values = {name: getattr(config, name) for name in OPTIONS} | {"out": out, "threads": threads}
    return {OPTIONS[name].key: plain(value) for name, value in values.items()}


def plain(value: Any) -> Any:
    """Return the value of an option as JSON holds it."""
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def command_line(path: Path, config: CompileConfig) -> str:
    """Write the command that compiles a model with these options, of which it names those that are no defaults."""
    words = ["asapc", "compile", str(path)]
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        if value != option.default:
            words += [word for item in (value if option.many else [value]) for word in written(option, item)]
    return shlex.join(words)


def written(option: Option, value: Any) -> list[str]:
    """Return one value of an option as words of a command line."""
    if option.kind is bool:
        return [option.flag] if value else []
    text = json.dumps(plain(value)) if isinstance(value, Mapping) else str(value)
    return [f"{option.flag}{text}"] if len(option.flag) == 2 else [option.flag, text]
