"""Recipes: what to train, on what and for how long, as small TOML files."""

from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from asapc.errors import OptionError
from asapc.training.tasks import TASKS
from asapc.types.options import NOUNS, Option, Range, of_field
from asapc.types.toml import read_toml

Attention = Literal["sinkhorn", "softmax", "sliced", "one_pass"]
MAX_STEPS, MAX_BATCH, MAX_ITERATIONS = 10**6, 4096, 1000
FILES = resources.files("asapc.models").joinpath("recipes")


@dataclass(frozen=True)
class Recipe:
    """A model and its training.

    Attributes:
        task: a name of `asapc.training.tasks.TASKS`.
        steps: of the optimizer.
        batch: samples a step, of all processes together.
        learning_rate: its largest; it grows over the first tenth of the steps and falls to zero by half a cosine.
        attention: of all layers.
        epsilon: the temperature, for Sinkhorn.
        iterations: T, of two half-steps each, for Sinkhorn.
        seed: of weights, order and augmentation; never of the held-out samples.
        model: further arguments of the model, which the task's own sizes give way to.

    Raises:
        OptionError: a value is of the wrong type, out of range, or none of the choices.
    """

    task: Annotated[str, Option("task", "")]
    steps: Annotated[int, Option("steps", "", range=Range(1, MAX_STEPS))]
    batch: Annotated[int, Option("batch", "", range=Range(1, MAX_BATCH))] = 64
    learning_rate: Annotated[float, Option("learning_rate", "", range=Range(0, above=True))] = 3e-3
    attention: Annotated[Attention, Option("attention", "")] = "sinkhorn"
    epsilon: Annotated[float, Option("epsilon", "", range=Range(0, above=True))] = 0.25
    iterations: Annotated[int, Option("iterations", "", range=Range(1, MAX_ITERATIONS))] = 20
    seed: Annotated[int, Option("seed", "", range=Range(0, 2**63 - 1))] = 0
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            option.clean(getattr(self, name))
        if self.task not in TASKS:
            raise OptionError(f"there is no task {self.task!r}", f"tasks: {', '.join(TASKS)}")
        check_model(self.model)

    @classmethod
    def read(cls, name: str | Path) -> "Recipe":
        """Read a recipe: one that asapc carries, by its name, or a TOML file.

        Raises:
            OptionError: there is no such recipe, it cannot be read, it lacks a key or has one too many, or a value is
                wrong.
        """
        if str(name) in shipped():
            path = Path(str(FILES.joinpath(f"{name}.toml")))
        elif Path(name).suffix == ".toml":
            path = Path(name)
        else:
            raise OptionError(f"there is no recipe {str(name)!r}", f"give a .toml file, or {', '.join(shipped())}")
        content = read_toml(path)
        keys = [entry.name for entry in fields(cls)]
        if unknown := next((key for key in content if key not in keys), None):
            raise OptionError(f"{path} sets `{unknown}`, which no recipe has", f"keys: {', '.join(keys)}")
        needed = (entry.name for entry in fields(cls) if entry.default is entry.default_factory is MISSING)
        if lacking := next((key for key in needed if key not in content), None):
            raise OptionError(f"{path} lacks `{lacking}`", "every recipe names its task and its steps")
        try:
            return cls(**content)
        except OptionError as error:
            raise OptionError(f"in {path}: {error}", error.hint) from None


HINTS = get_type_hints(Recipe, include_extras=True)
OPTIONS = {entry.name: of_field(entry, HINTS[entry.name]) for entry in fields(Recipe) if entry.name != "model"}


def shipped() -> list[str]:
    """Return the names of the recipes that asapc carries."""
    return sorted(entry.name.removesuffix(".toml") for entry in FILES.iterdir() if entry.name.endswith(".toml"))


def check_model(arguments: Any) -> None:
    """Raise OptionError unless the arguments of a model are sizes, and a table of options."""
    if not isinstance(arguments, dict):
        raise OptionError(f"model cannot be {arguments!r}", f"give model {NOUNS[dict][0]}")
    for name, value in arguments.items():
        if name in OPTIONS:
            raise OptionError(f"`{name}` stands in [model]", "move it above [model]")
        if name == "options" and isinstance(value, dict):
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or value not in Range(0):
            raise OptionError(f"{name} of [model] cannot be {value!r}"[:200], f"give {name} a number {Range(0)}")
