"""The facts about a machine, as `asapc doctor --json` prints them and as the rules read them."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Module:
    """A module that asapc imports, as a process of its own found it.

    Attributes:
        installed: whether Python finds it.
        version: None where it does not say.
        error: why it cannot be imported, in one line; None where it can, and where it is not installed.
        details: by module. torch: `cuda`, the version that it was built with, or None; `gpus`, how many it sees;
            `reason`, why it sees none. onnxruntime: `session`, whether it has InferenceSession; `providers`.
            tensorrt and tensorrt_rtx: `architectures`, those that it builds for ahead of time. Empty where it cannot
            be imported.
    """

    installed: bool
    version: str | None = None
    error: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        """Whether it can be imported."""
        return self.installed and self.error is None


@dataclass(frozen=True)
class Requirement:
    """A package that asapc asks for on this platform.

    Attributes:
        text: name and range, as pip takes them.
        name: of the distribution.
        extra: of asapc, which adds it; None where asapc always needs it.
        version: of what is installed, None for nothing.
        fits: whether that is within the range.
    """

    text: str
    name: str
    extra: str | None = None
    version: str | None = None
    fits: bool = False


@dataclass(frozen=True)
class Gpu:
    """A GPU of NVIDIA.

    Attributes:
        name: of the product.
        architecture: like "SM89"; None where the driver does not say.
        memory: in bytes; None where the driver does not say.
    """

    name: str
    architecture: str | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver.

    Attributes:
        version: of the driver, None where it does not say.
        cuda: the newest CUDA that it runs, like "12.8"; None where CUDA cannot be asked.
        error: why CUDA does not start; None where it does.
    """

    version: str | None = None
    cuda: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Folder:
    """A folder that asapc writes into.

    Attributes:
        use: what for: "temporary files", "cache", "output".
        path: the folder, or the nearest one above that exists.
        free: bytes, None where they cannot be counted.
        writable: whether this user may write there.
    """

    use: str
    path: str
    free: int | None
    writable: bool = True


@dataclass(frozen=True)
class Facts:
    """All of them.

    Attributes:
        asapc: its version.
        system: like "Linux-x86_64".
        python: its version.
        executable: of Python.
        requires_python: the range that asapc asks for, None where its metadata is missing.
        python_fits: whether this Python is within it.
        metadata_error: why the ranges of asapc's requirements are unknown; None where they are known.
        requirements: of asapc on this platform.
        modules: by name, those that may break.
        runtimes: installed distributions that hold the module `onnxruntime`.
        compiler: `asapc.commands.compile`: whether all that compiling needs can be imported together.
        driver: None without one.
        gpus: in the driver's order.
        folders: that asapc writes into.
    """

    asapc: str
    system: str
    python: str
    executable: str
    requires_python: str | None
    python_fits: bool
    metadata_error: str | None
    requirements: tuple[Requirement, ...]
    modules: dict[str, Module]
    runtimes: tuple[str, ...]
    compiler: Module
    driver: Driver | None
    gpus: tuple[Gpu, ...]
    folders: tuple[Folder, ...]

    def data(self) -> dict[str, Any]:
        """Return the facts for JSON."""
        return asdict(self)

    def requirement(self, name: str) -> Requirement | None:
        """Return what asapc asks of a distribution on this platform, None where it does not ask for it."""
        return next((requirement for requirement in self.requirements if requirement.name == name), None)
