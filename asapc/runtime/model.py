"""A compiled model to call from Python: `asapc.load(DIR)`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from asapc.config import MAX_THREADS
from asapc.errors import CheckpointError, DependencyError, InputError, OptionError
from asapc.loading.manifest import read_manifest
from asapc.runtime.arrays import by_name, checked, is_tensor, like
from asapc.runtime.onnx import open_cpu, open_cuda
from asapc.runtime.session import Session, Unavailable
from asapc.runtime.tensorrt import open_tensorrt
from asapc.types.interface import Interface, TensorInfo

Opener = Callable[[Path, Mapping[str, Any], int], Session]
# The best first: `auto` takes the first that can run here.
OPENERS: dict[str, Opener] = {"tensorrt": open_tensorrt, "cuda": open_cuda, "cpu": open_cpu}


class Model:
    """A compiled model, open on a device; any number of threads may call it at once.

    Call it with its inputs by position, by keyword or as one mapping by name: numpy arrays, or tensors of torch.
    float64 is read as float32 where the model takes that, and integers and floats are widened; nothing else is cast.
    A pickle of it, or a copy, opens the folder anew where it is read, in another process for example.

    Attributes:
        folder: where it was loaded from.
        options: device and threads, as `load` was given them.
        inputs, outputs: name, dtype and shape of each, in their order.
        axes: the range of each open axis that the shapes name.
        passed_over: why better devices were not taken, by their name.
    """

    def __init__(
        self,
        folder: Path,
        interface: Interface,
        session: Session,
        passed_over: Mapping[str, str],
        options: tuple[str, int],
    ) -> None:
        self.folder, self.interface, self.passed_over = folder, interface, dict(passed_over)
        self.options = options
        self.session: Session | None = session
        self.device, self.runtime = session.device, session.runtime
        self.axes = interface.axes

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """The inputs, in their order."""
        return self.interface.inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """The outputs, in their order."""
        return self.interface.outputs

    def __call__(self, *values: Any, **named: Any) -> dict[str, Any]:
        """Return the outputs by name, in their order: tensors where an input was one, else numpy arrays.

        Tensors come back on the device of the first, without gradients.

        Raises:
            InputError: the inputs are not those of the model, or it is closed.
            BuildError: the runtime cannot compute them.
        """
        session = self.session  # held until this call ends, whoever closes the model meanwhile
        if session is None:
            raise InputError(f"{self.folder} is closed", "load it again")
        inputs = by_name(self.interface, values, named)
        outputs = session.run(checked(self.interface, inputs))
        template = next((value for value in inputs.values() if is_tensor(value)), None)
        names = (info.name for info in self.outputs)
        return {name: like(template, output) for name, output in zip(names, outputs, strict=True)}

    def warmup(self, batch: int = 1) -> Self:
        """Run ones of the least lengths once, which takes what the first call takes longer than others; return self.

        Raises:
            InputError: the model takes no such batch.
        """
        if not is_count(batch, 1):
            raise InputError(f"the batch of a warm-up cannot be {batch!r}", "give a whole number of at least 1")
        self({info.name: np.ones(self.interface.least(info, batch), info.dtype) for info in self.inputs})
        return self

    def close(self) -> None:
        """Let go of the model; calls that run are finished."""
        self.session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.session is None:
            raise InputError(f"{self.folder} is closed", "load it again")
        # As text: pickles of paths are not read by every version of Python.
        return load, (str(self.folder.absolute()), *self.options)

    def __repr__(self) -> str:
        inputs = ", ".join(f"{info.name} {self.interface.described(info)}" for info in self.inputs)
        state = f"{self.runtime} on {self.device}" if self.session is not None else "closed"
        return f"<{self.folder}: {inputs} -> {', '.join(info.name for info in self.outputs)}; {state}>"


def is_count(value: object, least: int) -> bool:
    """Return whether a value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def load(folder: str | Path, device: str = "auto", threads: int = 0) -> Model:
    """Open what `asapc compile` wrote, without importing torch.

    Args:
        folder: what `asapc compile` wrote; sizes and hashes of its files are checked first.
        device: "tensorrt" (the engine, on its GPU), "cuda" or "cpu"; "auto" takes the first of these that can run here.
            `Model.device` and `Model.runtime` say which that was.
        threads: threads inside an operator on the CPU, at most four a core; 0 for one a core.

    Raises:
        CheckpointError: the folder is not whole, or no such folder.
        OptionError: an unknown device, or no number of threads.
        DependencyError: the device that was asked for is not there.
        BuildError: the runtime refuses the file.
    """
    if device not in ("auto", *OPENERS):
        raise OptionError(f"the device cannot be {device!r}", f"give one of auto, {', '.join(OPENERS)}")
    if not is_count(threads, 0) or threads > MAX_THREADS:
        raise OptionError(f"threads cannot be {threads!r}", f"give a whole number from 0 to {MAX_THREADS}, four a core")
    if not isinstance(folder, str | Path):
        raise OptionError(f"asapc.load takes a folder, not a {type(folder).__name__}", "give what --out named")
    path = Path(folder)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file; asapc.load opens the folder that `asapc compile` writes",
            "compile it, or read it with asapc.load_checkpoint",
        )
    manifest = read_manifest(path)
    passed_over: dict[str, str] = {}
    for name, opener in OPENERS.items():
        if device not in ("auto", name):
            continue
        try:
            session = opener(path, manifest, threads)
        except Unavailable as error:
            passed_over[name] = str(error)
        else:
            return Model(path, Interface.of(manifest), session, passed_over, (device, threads))
    raise DependencyError(f"{path} cannot run on {device}: {passed_over[device]}", "give another device, or auto")
