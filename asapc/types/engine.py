"""What an engine may be asked for, and what it consists of."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from asapc.errors import OptionError
from asapc.types.options import Option

Sizes = tuple[int, int, int]  # the least, that for which the engine is fastest, and the largest
UNITS = {"": 2**20, "MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30, "TB": 10**12, "TIB": 2**40}
FORM = "use INPUT=MIN:OPT:MAX with a size for every axis, as images=1x3x32x32:8x3x32x32:64x3x32x32"

ENGINE = "Engine"  # the heading of these options, fields of `asapc.config.CompileConfig`
GpuArch = Annotated[
    str,
    Option(
        "--gpu-arch",
        "GPU architectures to build for ahead of time, e.g. sm86,sm89,sm120. TensorRT-RTX alone.",
        ENGINE,
        metavar="NAME,...",
        default_text="all that TensorRT-RTX builds for",
    ),
]
Workspace = Annotated[
    str,
    Option(
        "--workspace",
        "GPU memory that a layer may take while it works: MiB, or with a unit, as 2GB.",
        ENGINE,
        metavar="SIZE",
        default_text="the whole GPU's",
    ),
]
Profile = Annotated[
    tuple[str, ...],
    Option(
        "--profile",
        "Sizes of an input: the least, that for which the engine is fastest, and the largest, e.g. "
        "images=1x3x32x32:8x3x32x32:64x3x32x32. Axes of other inputs that have the same name follow. Repeat to "
        "add.",
        ENGINE,
        metavar="INPUT=MIN:OPT:MAX",
        default_text="from 1, or the least of --dynamic, to the largest, and fastest there",
    ),
]
TimingCache = Annotated[
    str | Path | None,
    Option(
        "--timing-cache",
        "File of kernels' times that spares the next build measuring them, made where there is none. TensorRT alone.",
        ENGINE,
        metavar="FILE",
    ),
]
VersionCompatible = Annotated[
    bool,
    Option("--version-compatible", "Let later versions of TensorRT load the engine. TensorRT alone.", ENGINE),
]
HardwareCompatible = Annotated[
    bool,
    Option(
        "--hardware-compatible",
        "Let other GPUs, from Ampere on, run the engine, which may make it slower. TensorRT alone.",
        ENGINE,
    ),
]


@dataclass(frozen=True)
class EngineOptions:
    """What the user asks of an engine; by default whatever the builder does by itself.

    Attributes:
        architectures: of GPUs, like "SM89", to build for ahead of time; none for all that the builder knows.
        workspace: bytes of GPU memory that a layer may take while it works; None for as much as there is.
        profiles: sizes of every axis of some inputs, by the input's name.
        timing_cache: file with the times of kernels that earlier builds measured.
        version_compatible: whether later versions of TensorRT are to load the engine.
        hardware_compatible: whether GPUs of other architectures are to run it.
    """

    architectures: tuple[str, ...] = ()
    workspace: int | None = None
    profiles: Mapping[str, tuple[Sizes, ...]] = field(default_factory=dict)
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    @property
    def flags(self) -> list[str]:
        """The options of the command line that ask for anything."""
        flags = {
            "--gpu-arch": self.architectures,
            "--workspace": self.workspace,
            "--profile": self.profiles,
            "--timing-cache": self.timing_cache,
            "--version-compatible": self.version_compatible,
            "--hardware-compatible": self.hardware_compatible,
        }
        return [flag for flag, value in flags.items() if value]


@dataclass(frozen=True)
class Place:
    """Where a node of an ONNX file comes from, as far as it is known.

    Attributes:
        module: the path of the module in the model, "" for the model itself.
        source: the user's line, as "file:line".
        site: the name of the site whose operator the node belongs to.
    """

    module: str | None = None
    source: str | None = None
    site: str | None = None

    def __str__(self) -> str:
        parts = [f"module {self.module}" if self.module else "", self.source or ""]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class EngineLayer:
    """A layer of an engine, as its builder lists it.

    Attributes:
        name: the builder's.
        kind: what runs it: a generated kernel, a matrix product, ...
        precision: types of what it reads and writes, in the builder's words.
        nodes: of the ONNX file, those that it computes or takes part in.
        attention: whether it is attention as one kernel.
    """

    name: str
    kind: str
    precision: tuple[str, ...]
    nodes: tuple[str, ...]
    attention: bool

    @classmethod
    def of(cls, name: str, kind: str, precision: Sequence[str], nodes: Sequence[str], attention: bool) -> "EngineLayer":
        """Return the layer of which JSON holds the fields."""
        return cls(name, kind, tuple(precision), tuple(nodes), attention)


def parse_architectures(text: str) -> tuple[str, ...]:
    """Parse `sm86,sm89,sm120`.

    Raises:
        OptionError: one of them is empty or stands there twice.
    """
    names = tuple(name.strip().upper() for name in text.split(",")) if text else ()
    if len(set(names)) < len(names) or not all(names):
        raise OptionError(f"--gpu-arch {text[:200]!r} has an empty name or one name twice", "use sm86,sm89,sm120")
    return names


def parse_memory(text: str) -> int | None:
    """Return the bytes of `512`, which are MiB, or of `2GB`; None where the text is empty.

    Raises:
        OptionError: it is neither, or less than 1 MiB.
    """
    if not text:
        return None
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]*)\s*", text, re.ASCII | re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match and match[2].upper() in UNITS else 0
    if not 2**20 <= size < 2**63:
        raise OptionError(f"--workspace cannot be {text[:200]!r}", "give MiB, as 512, or a unit: 512MiB, 2GB, 2GiB")
    return size


def parse_profiles(texts: Sequence[str]) -> dict[str, tuple[Sizes, ...]]:
    """Parse `images=1x3x32x32:8x3x32x32:64x3x32x32` and the like: sizes of every axis, by the input's name.

    Raises:
        OptionError: one is not of that form, has sizes that do not ascend, or an input stands there twice.
    """
    profiles: dict[str, tuple[Sizes, ...]] = {}
    for text in texts:
        name, _, rest = text.rpartition("=")
        shapes = rest.split(":")
        if not name or len(shapes) != 3 or not all(re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8})*", s) for s in shapes):
            raise OptionError(f"cannot read --profile {text[:200]!r}", FORM)
        least, best, most = ([int(size) for size in shape.split("x")] for shape in shapes)
        if not len(least) == len(best) == len(most):
            raise OptionError(f"--profile {text[:200]!r} has shapes of different length", FORM)
        sizes = tuple(zip(least, best, most, strict=True))
        if not all(low <= middle <= high for low, middle, high in sizes):
            raise OptionError(f"the sizes of --profile {text[:200]!r} do not ascend", "give MIN <= OPT <= MAX")
        if name in profiles:
            raise OptionError(f"--profile has input {name!r} twice", "give one profile for each input")
        profiles[name] = sizes
    return profiles
