"""What the machine does while it is measured, and how fast it is."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch

from asapc.backends.base import Runner
from asapc.timing.blocks import Open
from asapc.types.samples import Samples
from asapc.types.timing import Conditions

MIN_WATCH = 1.0  # seconds, of which the system's counts say something
BUSY = 0.2  # cores that others may keep busy before that is worth a warning
LAYERS, WIDTH, ROWS = 6, 256, 64  # of the reference workload: about a millisecond on one core of today
REFERENCE_INPUTS = Samples({"x": torch.linspace(-1, 1, ROWS * WIDTH).reshape(1, ROWS, WIDTH)})


class Watch:
    """Watches the machine from its creation on, until asked for the `conditions`."""

    def __init__(self) -> None:
        self.start, self.load, self.megahertz = snapshot(), load(), megahertz()

    @property
    def conditions(self) -> Conditions:
        """What was seen."""
        (then, used_then, own_then), (now, used_now, own_now) = self.start, snapshot()
        others = None
        if now - then >= MIN_WATCH and used_now is not None and used_then is not None:
            # The system counts in hundredths of a second.
            others = max(0.0, (used_now - used_then) - (own_now - own_then)) / (now - then)
        return Conditions(cores(), self.load, others, (*self.megahertz, *megahertz()))


def warn_of_load(conditions: Conditions) -> list[str]:
    """Return what the conditions say against the figures."""
    others = conditions.others
    if others is None or others <= BUSY:
        return []
    return [f"other processes kept {others:.1f} cores busy meanwhile"]


def snapshot() -> tuple[float, float | None, float]:
    """Return the time, and the seconds of processors used so far: by all, None if unknown, and by this process."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Time of guests is part of user time, and stolen time is not this machine's.
    extra = sum(getattr(times, name, 0.0) for name in ("guest", "guest_nice", "steal"))
    used = sum(times) - idle - extra
    process = psutil.Process().cpu_times()
    return time.perf_counter(), used if used > 0 else None, process.user + process.system


def load() -> float | None:
    """Return the load average over a minute, None where there is none."""
    return psutil.getloadavg()[0] if hasattr(psutil, "getloadavg") else None


def megahertz() -> tuple[float, ...]:
    """Return the frequency of the CPU; empty where the system does not tell."""
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        return ()
    return () if frequency is None else (round(frequency.current, 1),)


def cores() -> tuple[int, ...]:
    """Return the numbers of the cores that this process may run on; empty where the system does not tell."""
    process = psutil.Process()
    return tuple(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else ()


class Reference:
    """A runner that does the same work whatever it is given: by it two measurements tell how fast the machine was.

    Args:
        runner: of the reference workload.
        calls: how often it runs; as long as the model takes, for the system interrupts long work more than short.
    """

    def __init__(self, runner: Runner, calls: int) -> None:
        self.runner, self.calls, self.runtime = runner, calls, runner.runtime

    def __call__(self, samples: Samples) -> list[torch.Tensor]:
        """Do the work."""
        for _ in range(self.calls - 1):
            self.runner(REFERENCE_INPUTS)
        return self.runner(REFERENCE_INPUTS)


@contextmanager
def reference(open_file: Callable[[Path], Runner]) -> Iterator[Callable[[int], Open]]:
    """Yield what opens sessions of the reference workload: products and exponentials, as attention is made of.

    It takes the number of calls that a turn has.

    Args:
        open_file: opens an ONNX file in the runtime that is measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.onnx"
        path.write_bytes(reference_model())
        yield lambda calls: lambda: Reference(open_file(path), calls)


def reference_model() -> bytes:
    """Build the reference workload, always the same bytes' worth of work."""
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
    nodes, value = [], "x"
    for layer in range(LAYERS):
        nodes += [
            helper.make_node("MatMul", [value, "weights"], [f"scores.{layer}"]),
            helper.make_node("Softmax", [f"scores.{layer}"], [f"plan.{layer}"], axis=-1),
        ]
        value = f"plan.{layer}"
    shape = ["batch", ROWS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "reference",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())
