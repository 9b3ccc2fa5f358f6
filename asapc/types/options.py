"""The values that options may take, and the record that declares an option."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from asapc.errors import OptionError

# What to do with a model that stops early on the calibration samples: take its loops to their bound, or refuse it.
EarlyStopRule = Literal["bound", "refuse"]
# Loops as written, exact rewrites only, approximations within the budget.
Level = Literal[0, 1, 2]
# How an operator is lowered, see `types.choices.Candidate`; "auto" takes what is cheapest for each.
Lowering = Literal["materialised", "interleaved", "fused"]
LoweringRule = Literal["auto", "materialised", "fused"]
# The operators that the planner may use, see `types.choices.FeatureSet.kind`.
OperatorKind = Literal["one-pass", "hinges", "sorted", "amortised", "truncated", "exact"]
# Of the products in an engine; duals, scaling vectors and exponentials are float32 in any case.
Precision = Literal["float32", "float16", "bfloat16"]

# What a model is compiled for: what is here, a CPU, a GPU, or a GPU with an engine of a builder asked for by name.
Target = Literal["auto", "onnx", "cuda", "tensorrt", "tensorrt-rtx"]

# Types as messages name them: one value, several, and what a TOML file has instead.
NOUNS = {
    bool: ("true or false", ""),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    Path: ("a string", "strings"),
    list: ("a list", ""),
    dict: ("a table", ""),
}


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, both included unless `above` excludes `low`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        return over and value <= self.high and value < math.inf  # isfinite would overflow on long integers

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"from {self.low} to {self.high}"
        return f"{'above' if self.above else 'of at least'} {self.low}, and finite"


@dataclass(frozen=True)
class Option:
    """Declares an option: how it is written, described and checked.

    It annotates a field of a dataclass, from which `declared` reads everything below `range`.

    Attributes:
        flag: as on the command line; without its dashes the key in a TOML file.
        help: what it does, in sentences.
        group: the heading it stands under, empty for the options that most people need.
        metavar: stands for the value in usage; without one choices stand for themselves.
        default_text: the default in words, where the field's own says too little.
        range: numbers that are allowed.
        code: whether it makes code run that the value names or that stands in a file.
        name: of the field.
        kind: the type of one value.
        many: whether there may be several values, as a tuple.
        table: whether a mapping will do too.
        choices: the only values allowed, if there are any.
        default: of the field.
    """

    flag: str
    help: str
    group: str = ""
    metavar: str = ""
    default_text: str = ""
    range: Range | None = None
    code: bool = False
    name: str = ""
    kind: type = str
    many: bool = False
    table: bool = False
    choices: tuple[Any, ...] = ()
    default: Any = None

    @property
    def key(self) -> str:
        """The key in a TOML file."""
        return self.flag.lstrip("-")

    @property
    def names(self) -> str:
        """The flag, and where Python calls it otherwise its name there."""
        return self.flag if self.key.replace("-", "_") == self.name else f"{self.flag} (in Python {self.name})"

    @property
    def shown_default(self) -> str:
        """The default as help shows it, empty where there is nothing to show."""
        if self.default_text or self.kind is bool:
            return self.default_text
        values = self.default if self.many else (self.default,)
        return " and ".join(f"{value:g}" if self.kind is float else str(value) for value in values if value is not None)

    def clean(self, value: Any) -> Any:
        """Check a value and return it: paths as `Path`, several values as a tuple, however Python gave them.

        Raises:
            OptionError: its type is wrong, or it is none of the choices, or a number out of range.
        """
        if self.many:
            value = tuple(value) if isinstance(value, list | tuple) else (value,)
        for item in value if self.many else (value,):
            self.check_type(item)
        if self.choices and value not in self.choices:
            *others, last = map(str, self.choices)
            raise OptionError(f"{self.flag} cannot be {value!r}", f"give {self.names} {', '.join(others)} or {last}")
        numbers = value if self.many else (value,)
        if self.range is not None:
            wrong = next((number for number in numbers if number not in self.range), None if numbers else "empty")
            if wrong is not None:
                raise OptionError(f"{self.flag} cannot be {wrong}", f"give {self.names} a value {self.range}")
        return Path(value) if self.kind is Path and value is not None else value

    def check_type(self, value: Any) -> None:
        """Raise OptionError unless a value, one of several where there may be, is of the option's type."""
        types = {Path: str | Path, float: float | int}.get(self.kind, self.kind)
        right = isinstance(value, types) and (self.kind is bool or not isinstance(value, bool))
        if right or (value is None and self.default is None) or (self.table and isinstance(value, dict)):
            return
        raise OptionError(f"{self.flag} cannot be {value!r}", f"give {self.names} {NOUNS[self.kind][0]}")

    def read(self, key: str, value: Any) -> Any:
        """Bring a value from a TOML file, where it stands under `key`, into the type of the field.

        Raises:
            OptionError: its type is wrong.
        """
        values = value if self.many and type(value) is list else [value]
        allowed = {int: (int,), float: (int, float), bool: (bool,)}.get(self.kind, (str,))
        wrong = next((item for item in values if type(item) not in allowed), None)
        if wrong is None:
            return tuple(values) if self.many else value
        if self.table and type(value) is dict:
            return value
        one, several = NOUNS[self.kind]
        expected = [one, *([f"a list of {several}"] if self.many else []), *(["a table"] if self.table else [])]
        item = "" if wrong is value else f", which holds {noun(wrong)}"
        message = f"`{key}` must be {' or '.join(expected)}, the file has {noun(value)}{item}"
        raise OptionError(message, "`asapc compile --help` describes every option")


def noun(value: object) -> str:
    """Return the type of a value in a TOML file, in words."""
    if isinstance(value, bool):
        return "a boolean"
    return next((one for kind, (one, _) in NOUNS.items() if isinstance(value, kind)), "a date or time")


def declared(config: type) -> dict[str, Option]:
    """Return the options that the fields of a dataclass declare, by the names of the fields."""
    hints = get_type_hints(config, include_extras=True)
    return {field.name: of_field(field, hints[field.name]) for field in dataclasses.fields(config)}


def of_field(field: dataclasses.Field[Any], hint: Any) -> Option:
    """Return the option that a field declares, completed by its name, type and default.

    Raises:
        TypeError: the field declares none.
    """
    annotation, option = get_args(hint) if get_origin(hint) is Annotated else (hint, None)
    if not isinstance(option, Option):
        raise TypeError(f"{field.name} declares no option")
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    # Of several types the first of these is what text, from a command line or a file, becomes.
    kinds = [type(choice) for choice in choices] or get_args(annotation) or (annotation,)
    return dataclasses.replace(
        option,
        name=field.name,
        kind=next(kind for kind in (Path, str, bool, int, float) if kind in kinds),
        many=get_origin(annotation) is tuple,
        table=any(get_origin(kind) is dict for kind in kinds),
        choices=choices,
        metavar=option.metavar or "|".join(map(str, choices)),
        default=field.default,
    )
