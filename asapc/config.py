"""What a compilation can be told, in one frozen dataclass."""

import os
import tomllib
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, get_args

from asapc.errors import OptionError
from asapc.types.budget import Bound, parse_bound
from asapc.types.options import EarlyStopRule, Lowering, LoweringRule, Precision

# More only wait for each other, and far more crash ONNX Runtime for want of memory, without an error to catch.
MAX_THREADS = 4 * (os.cpu_count() or 1)
# Activations grow with the batch: a slip of the keyboard here would take all memory, and the process with it.
MAX_BATCH = 4096

LEVELS = (0, 1, 2)  # loops as written, exact rewrites only, approximations within the budget


# What a TOML file may hold where that is not the type of the default.
TOML_TYPES: dict[str, tuple[type, ...]] = {
    "out": (str,),
    "calib": (str,),
    "seconds": (int, float),
    "relu_activations": (int, float),
    "model": (str,),
    "model_args": (str, dict),
    "inputs": (str,),
    "input_shape": (list,),
    "fidelity": (list,),
    "slices": (list,),
    "pieces": (list,),
    "batches": (list,),
}


@dataclass(frozen=True)
class CompileConfig:
    """Options of a compilation.

    Attributes:
        out: output folder; None for "<name>.asap" in the working directory.
        dump: folder for the program after each stage; None for none.
        force: replace the output folder if it exists.
        calib: .npz or .pt file with calibration samples; None for those inside the checkpoint.
        model: "package.module:factory", a class or function that builds the model of which the file holds the weights.
        model_args: its keyword arguments: JSON, the path of a JSON file, or a mapping.
        inputs: .npz or .pt file with example inputs, good enough to look into a model, not to calibrate it.
        input_shape: random example inputs instead, such as "x=2,197,64:float32" or "ids=2,128:int64:0..30000".
        unsafe_load: read a pickled module, which runs code from the file.
        fidelity: the budget, terms such as "agreement>=0.99"; empty for DEFAULT_BUDGET.
        early_stop: "bound" captures loops that stop early at their bound, and says what that changes; "refuse"
            refuses the model where it changes anything on the calibration samples.
        lowering: "auto" lowers each operator as is cheapest for the largest batch; "materialised" makes scores and
            takes standard ONNX operators alone; "fused" takes the runtime's attention where there is a fused form.
        precision: of the engine's layers and products; what ONNX Runtime gets is float32.
        relu_activations: largest error that ReLU networks in the place of smooth activations may have, where their
            inputs have been on the calibration samples; 0 leaves activations alone.
        dynamic: open axes of the inputs with their ranges, such as "batch=1:64,seq=16:2048"; see `asapc.dynamic`.
        slices: numbers of sorted slices that the planner may give a site, in the order it tries them.
        batches: batch sizes at which latency is measured, up to MAX_BATCH.
        seconds: time spent on measuring each batch size.
        threads: threads of torch and ONNX Runtime, up to MAX_THREADS, four a core; 0 for as many as torch takes by
            itself, one a core.
        seed: seeds everything that draws random numbers.
    """

    out: str | Path | None = None
    dump: str | Path | None = None
    force: bool = False
    calib: str | Path | None = None
    model: str | None = None
    model_args: str | dict[str, Any] | None = None
    inputs: str | Path | None = None
    input_shape: tuple[str, ...] = ()
    unsafe_load: bool = False
    fidelity: tuple[str, ...] = ()
    early_stop: EarlyStopRule = "bound"
    level: int = 2
    lowering: LoweringRule = "auto"
    precision: Precision = "float32"
    relu_activations: float = 0.0
    dynamic: str = ""
    slices: tuple[int, ...] = (0,)
    pieces: tuple[int, ...] = (0, 8)
    batches: tuple[int, ...] = (1, 32)
    seconds: float = 10.0
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("out", "dump", "calib", "inputs"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(value))
        self.bounds()
        for name, values, low, high in (
            ("slices", self.slices, 0, inf),
            ("pieces", self.pieces, 0, inf),
            ("batches", self.batches, 1, MAX_BATCH),
            ("threads", (self.threads,), 0, MAX_THREADS),
            ("seed", (self.seed,), 0, 2**63 - 1),
        ):
            if not values or min(values) < low or max(values) > high:
                shown = ", ".join(map(str, values)) or "empty"
                span = f"of at least {low}" if high == inf else f"from {low} to {high}"
                raise OptionError(f"{name} is {shown}", f"give {name} a value {span}")
        for name, value, rule in (
            ("early_stop", self.early_stop, EarlyStopRule),
            ("lowering", self.lowering, LoweringRule),
            ("precision", self.precision, Precision),
        ):
            if value not in get_args(rule):
                raise OptionError(f"{name} is {value!r}", f"give {name} the value {' or '.join(get_args(rule))}")
        if self.level not in LEVELS:
            raise OptionError(f"level is {self.level}", "give the level 0, 1 or 2")
        if not 0 < self.seconds < inf:
            raise OptionError(f"seconds is {self.seconds}", "give seconds a positive, finite value")
        if not 0 <= self.relu_activations < inf:
            raise OptionError(f"relu_activations is {self.relu_activations}", "give it a finite error above 0")

    def bounds(self) -> tuple[Bound, ...]:
        """The fidelity budget, parsed."""
        return tuple(parse_bound(term) for term in self.fidelity)

    @property
    def wanted_lowering(self) -> Lowering | None:
        """The lowering that is asked for, None for the cheapest."""
        return None if self.lowering == "auto" else self.lowering

    @classmethod
    def from_toml(cls, path: Path) -> "CompileConfig":
        """Read options from a TOML file whose keys are the attributes above.

        Raises:
            OptionError: the file cannot be read, or holds a key or a type that asapc does not know.
        """
        try:
            values: dict[str, Any] = tomllib.loads(path.read_text())
        except OSError as error:
            why = (error.strerror or "it is no file").lower()
            raise OptionError(f"cannot read {path}: {why}", "give a TOML file of options") from None
        except ValueError as error:  # no TOML, no text, or no path
            raise OptionError(f"cannot read {path}: {error}", "give a TOML file of options") from None
        known = [field.name for field in fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise OptionError(f"{path} sets {name!r}, which is no option", f"options: {', '.join(known)}")
            if type(value) not in TOML_TYPES.get(name, (type(getattr(cls, name)),)):
                raise OptionError(f"{path} sets {name} to {value!r}", "its type is wrong; see the README")
            if isinstance(value, list):
                if any(type(item) is not (str if name in ("fidelity", "input_shape") else int) for item in value):
                    raise OptionError(f"{path} sets {name} to {value!r}", "its items have the wrong type")
                values[name] = tuple(value)
        return cls(**values)
