"""What a compilation can be told: each option declared once, for Python, TOML, the command line and docs/options.md."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from asapc.errors import OptionError
from asapc.types import engine
from asapc.types.axes import parse_ranges
from asapc.types.budget import DEFAULT_BUDGET, METRICS, Bound, parse_bound
from asapc.types.options import (
    EarlyStopRule,
    Level,
    Lowering,
    LoweringRule,
    OperatorKind,
    Option,
    Precision,
    Range,
    Target,
    declared,
)
from asapc.types.toml import read_toml

# More only wait for each other, and far more crash ONNX Runtime for want of memory, without an error to catch.
MAX_THREADS = 4 * (os.cpu_count() or 1)
# Activations grow with the batch: a slip of the keyboard here would take all memory, and the process with it.
MAX_BATCH = 4096
SLICES = 8  # where an operator has to be sorted; more gave little, see docs/fidelity.md

READING = "Reading the model"
OPERATORS = "Operators and export"
MEASURING = "Measuring"


@dataclass(frozen=True)
class CompileConfig:
    """Options of a compilation.

    Raises:
        OptionError: a value is out of range, none of the choices, or a budget or axes that cannot be read.
    """

    out: Annotated[
        str | Path | None,
        Option("--out", "Output folder.", metavar="DIR", default_text="NAME.asap in the working directory"),
    ] = None
    force: Annotated[bool, Option("--force", "Replace the output folder if it exists.")] = False
    samples_in_folder: Annotated[
        int,
        Option(
            "--samples-in-folder",
            "Held-out samples to put into the output folder with their outputs, for whoever tries the model. They are "
            "your data; 0 leaves them out.",
            metavar="COUNT",
            range=Range(0, MAX_BATCH),
        ),
    ] = 4
    dump: Annotated[
        str | Path | None,
        Option("--dump", "Write the program after each stage into this folder, to find a wrong node.", metavar="DIR"),
    ] = None
    calib: Annotated[
        str | Path | None,
        Option(
            "--calib",
            "Calibration samples, .npz, .npy or .pt: arrays named as the model's inputs, and optional labels.",
            metavar="FILE",
            default_text="those in the checkpoint",
        ),
    ] = None
    fidelity: Annotated[
        tuple[str, ...],
        Option(
            "--fidelity",
            f"Term of the fidelity budget: {', '.join(f'{name}{sign}X' for name, sign in METRICS.items())} "
            "(metric-drop in percentage points). Quote it in a shell: 'agreement>=0.99'. Repeat to add.",
            metavar="TERM",
            default_text="{}, or {} without classes, and {}".format(*DEFAULT_BUDGET),
        ),
    ] = ()
    level: Annotated[
        Level,
        Option("-O", "0 leaves the loops as written, 1 rewrites them exactly, 2 approximates them within the budget."),
    ] = 2
    model: Annotated[
        str | None,
        Option(
            "--model",
            "Class or function that builds the model of which the file holds the weights. The working directory is "
            "importable.",
            READING,
            metavar="MODULE:FACTORY",
            code=True,
        ),
    ] = None
    model_args: Annotated[
        str | dict[str, Any] | None,
        Option("--model-args", "Keyword arguments of --model: a JSON object, or a file with one.", READING, "JSON"),
    ] = None
    weights: Annotated[
        str | None,
        Option(
            "--weights",
            "Which weights of the file, where several fit the model: the keys that lead to them, or what their names "
            "begin with.",
            READING,
            metavar="PLACE",
        ),
    ] = None
    inputs: Annotated[
        str | Path | None,
        Option(
            "--inputs",
            "Example inputs, .npz, .npy or .pt, to look into the model with. Never used for calibration.",
            READING,
            metavar="FILE",
        ),
    ] = None
    input_shape: Annotated[
        tuple[str, ...],
        Option(
            "--input-shape",
            "Random example inputs instead, e.g. x=2,197,64:float32, mask=2,197:bool, ids=2,128:int64:0..30000 (both "
            "included, 0..1 by default). Repeat for each input. Never used for calibration.",
            READING,
            metavar="NAME=SIZES:DTYPE",
        ),
    ] = ()
    unsafe_load: Annotated[
        bool,
        Option(
            "--unsafe-load",
            "Read a pickled module or other Python objects. This runs code that is in the file, with your rights: "
            "only for files that you would run as a program.",
            READING,
            code=True,
        ),
    ] = False
    early_stop: Annotated[
        EarlyStopRule,
        Option(
            "--early-stop",
            "What to do with loops that stop early on the calibration samples: run them to their bound and report "
            "what that changes, or refuse the model where it changes anything.",
            READING,
        ),
    ] = "bound"
    no_cache: Annotated[
        bool,
        Option("--no-cache", "Fit anew, and keep nothing for another budget of the same model.", OPERATORS),
    ] = False
    lowering: Annotated[
        LoweringRule,
        Option(
            "--lowering",
            "What operators become: whatever is cheapest for the largest batch, standard ONNX operators on a matrix of "
            "scores, or the runtime's fused attention.",
            OPERATORS,
        ),
    ] = "auto"
    target: Annotated[
        Target,
        Option(
            "--target",
            "What to plan for and build. onnx: a CPU, no engine; cuda: an NVIDIA GPU, here or elsewhere, no engine; "
            "tensorrt, which needs one here, or tensorrt-rtx: a GPU, and that engine or an error; auto: a GPU where "
            "there is one, else a CPU, and an engine where one can be built, else a warning.",
            OPERATORS,
            metavar="TARGET",  # the choices, which the sentence has, would break at 80 columns
        ),
    ] = "auto"
    costs: Annotated[
        str | Path | None,
        Option(
            "--costs",
            "Costs by which the planner compares operators, as `asapc costs` measures them.",
            OPERATORS,
            metavar="FILE",
            default_text="those that asapc carries for the target",
        ),
    ] = None
    precision: Annotated[
        Precision,
        Option(
            "--precision",
            "Precision of the engine's layers and products. Duals and exponentials stay in float32, and so does "
            "model.onnx.",
            OPERATORS,
        ),
    ] = "float32"
    relu_activations: Annotated[
        float,
        Option(
            "--relu-activations",
            "Replace GELU and other smooth activations by ReLU networks, each off by no more than this on the "
            "calibration samples. 0 leaves them alone.",
            OPERATORS,
            metavar="ERROR",
            range=Range(0),
        ),
    ] = 0.0
    dynamic: Annotated[
        str,
        Option(
            "--dynamic",
            "Open axes of the inputs: batch=1:64, seq=16:2048 for the second axis, or INPUT.AXIS=LOW:HIGH.",
            OPERATORS,
            metavar="AXIS=LOW:HIGH,...",
            default_text="the batch alone",
        ),
    ] = ""
    output_names: Annotated[
        str,
        Option(
            "--output-names",
            "What to call the outputs of the model, in their order.",
            OPERATORS,
            metavar="NAME,...",
            default_text="as the forward's dict, dataclass or named tuple calls them",
        ),
    ] = ""
    operators: Annotated[
        str,
        Option(
            "--operators",
            f"Operators that the planner may use: {', '.join(get_args(OperatorKind))}.",
            OPERATORS,
            metavar="KIND,...",
            default_text="all",
        ),
    ] = ",".join(get_args(OperatorKind))
    slices: Annotated[
        tuple[int, ...],
        Option(
            "--slices",
            "Sorted slices that the planner may give a site, besides operators without. Repeat to add.",
            OPERATORS,
            metavar="COUNT",
            default_text=f"0, or {SLICES} where --operators names no other sliced dual",
            range=Range(0),
        ),
    ] = (0,)
    pieces: Annotated[
        tuple[int, ...],
        Option(
            "--pieces",
            "Hinge pieces that the planner may give the first coordinates of a site, 0 for no hinges. Repeat to add.",
            OPERATORS,
            metavar="COUNT",
            range=Range(0),
        ),
    ] = (0, 8)
    gpu_arch: engine.GpuArch = ""
    workspace: engine.Workspace = ""
    profile: engine.Profile = ()
    timing_cache: engine.TimingCache = None
    version_compatible: engine.VersionCompatible = False
    hardware_compatible: engine.HardwareCompatible = False
    batches: Annotated[
        tuple[int, ...],
        Option(
            "--batch",
            f"Batch size at which to measure latency, at most {MAX_BATCH}. Repeat to add.",
            MEASURING,
            metavar="SIZE",
            range=Range(1, MAX_BATCH),
        ),
    ] = (1, 32)
    seconds: Annotated[
        float,
        Option(
            "--seconds",
            "The most time to measure each batch size; it ends where all ratios are known to within 1 %.",
            MEASURING,
            metavar="SECONDS",
            range=Range(0, above=True),
        ),
    ] = 10.0
    threads: Annotated[
        int,
        Option(
            "--threads",
            "Threads of torch and ONNX Runtime, at most four a core.",
            MEASURING,
            metavar="COUNT",
            default_text="0, one a core",
            range=Range(0, MAX_THREADS),
        ),
    ] = 0
    seed: Annotated[
        int,
        Option("--seed", "Seed of everything random.", MEASURING, metavar="SEED", range=Range(0, 2**63 - 1)),
    ] = 0

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.clean(getattr(self, name)))
        self.bounds()
        parse_ranges(self.dynamic)
        self.engine_options()
        if "sorted" not in self.kinds() and any(self.slices):
            raise OptionError("--slices asks for sorted slices, which --operators leaves out", "omit one of the two")

    def bounds(self) -> tuple[Bound, ...]:
        """Return the fidelity budget, parsed."""
        return tuple(parse_bound(term) for term in self.fidelity)

    def engine_options(self) -> engine.EngineOptions:
        """Return what is asked of the engine, parsed."""
        return engine.EngineOptions(
            engine.parse_architectures(self.gpu_arch),
            engine.parse_memory(self.workspace),
            engine.parse_profiles(self.profile),
            None if self.timing_cache is None else Path(self.timing_cache),
            self.version_compatible,
            self.hardware_compatible,
        )

    def kinds(self) -> frozenset[str]:
        """Return the kinds of operators that the planner may use."""
        kinds, allowed = frozenset(kind.strip() for kind in self.operators.split(",")), get_args(OperatorKind)
        if unknown := kinds - set(allowed):
            raise OptionError(
                f"--operators cannot be {min(unknown)!r}", f"give some of {', '.join(allowed)}, with commas between"
            )
        return kinds

    def slice_counts(self) -> tuple[int, ...]:
        """Return the numbers of sorted slices that operators may have, 0 among them unless all have to be sorted."""
        only_sorted = not self.kinds() & {"one-pass", "hinges"}
        counts = tuple(count for count in self.slices if count > 0)
        if "sorted" not in self.kinds():
            return (0,)
        return (counts or (SLICES,)) if only_sorted else (0, *counts)

    @property
    def wanted_lowering(self) -> Lowering | None:
        """The lowering that is asked for, None for the cheapest."""
        return None if self.lowering == "auto" else self.lowering

    @classmethod
    def from_toml(cls, path: Path, trusted: bool = False) -> "CompileConfig":
        """Read options from a TOML file, under the names of their flags or of the attributes above.

        Args:
            path: the file.
            trusted: whether it may set options that make code run.

        Raises:
            OptionError: the file cannot be read, holds a key or a type that asapc does not know, or would make code
                run without being trusted.
        """
        content = read_toml(path)
        options = {key: option for option in OPTIONS.values() for key in (option.key, option.name)}
        values: dict[str, tuple[str, Any]] = {}
        for key, value in content.items():
            if key not in options:
                keys = ", ".join(option.key for option in OPTIONS.values())
                raise OptionError(f"{path} sets `{key}`, which is no option", f"options: {keys}")
            option = options[key]
            if option.code and not trusted:
                raise OptionError(
                    f"{path} sets `{key}`, which makes code run",
                    f"give {option.flag} on the command line, or add --trust-config if you trust the file",
                )
            if option.name in values:
                raise OptionError(f"{path} sets both `{option.key}` and `{option.name}`", "keep one: they are the same")
            values[option.name] = (key, value)
        try:
            return cls(**{name: OPTIONS[name].read(key, value) for name, (key, value) in values.items()})
        except OptionError as error:
            raise OptionError(f"in {path}: {error}", error.hint) from None


OPTIONS = declared(CompileConfig)
ATTRIBUTES = "\n".join(f"        {option.name}: {option.help}" for option in OPTIONS.values())
CompileConfig.__doc__ = f"{CompileConfig.__doc__}\n    Attributes:\n{ATTRIBUTES}\n"


def options_of(config: CompileConfig | None) -> CompileConfig:
    """Return options as a function was given them, the defaults for None; raise OptionError if they are no such."""
    if config is not None and not isinstance(config, CompileConfig):
        raise OptionError(f"config is a {type(config).__name__}", "give an asapc.CompileConfig, or options as keywords")
    return config or CompileConfig()
