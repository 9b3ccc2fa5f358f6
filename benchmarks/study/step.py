"""One training step of one attention layer, and in a process of its own the memory that it takes.

    python -m benchmarks.study.step "Sinkhorn, log" 256    # prints bytes

It imports little, since it is started once for each attention and length.
"""

import resource
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from asapc.models.sinkhorn import Sinkhorn
from asapc.models.sliced import SlicedTransport
from asapc.models.softmax import Softmax
from asapc.types.samples import Samples
from benchmarks.memory import growth

ROOT = Path(__file__).resolve().parents[2]
BATCH, HEADS, SIZE = 1, 4, 64
ITERATIONS, EPSILON = 20, 0.25
SLICES = (8, 32, 64)
WARM_UP_LENGTH = 8
SHARE_OF_MEMORY = 0.8  # of what is free: a step that needs more fails, and takes nothing else with it
REFUSAL = "can't allocate memory"  # what torch says then


class Step:
    """Forward and backward through a kernel, as a runner that can be timed."""

    runtime = "torch"

    def __init__(self, kernel: nn.Module) -> None:
        self.kernel = kernel

    def __call__(self, samples: Samples) -> list[Tensor]:
        """Return the gradients of the queries, keys and values of one batch."""
        points = [value.detach().requires_grad_() for value in samples.inputs.values()]
        return list(torch.autograd.grad(self.kernel(*points).square().sum(), points))


def kernels() -> dict[str, nn.Module]:
    """Return the attentions that are compared, by name."""
    return {
        "softmax": Softmax(),
        "Sinkhorn, log": Sinkhorn(EPSILON, ITERATIONS, form="log"),
        "Sinkhorn, scaling": Sinkhorn(EPSILON, ITERATIONS, form="scaling"),
        "Sinkhorn, recompute": Sinkhorn(EPSILON, ITERATIONS, form="recompute"),
        **{f"{count} slices": SlicedTransport(count) for count in SLICES},
    }


def inputs(length: int) -> Samples:
    """Return random queries, keys and values (B, H, N, D)."""
    generator = torch.Generator().manual_seed(0)
    return Samples({name: torch.randn(BATCH, HEADS, length, SIZE, generator=generator) for name in "qkv"})


def peak(name: str, length: int) -> int | None:
    """Return the bytes of a step at its peak, in a new process; None where memory does not suffice.

    Raises:
        RuntimeError: the process failed for another reason.
    """
    command = [sys.executable, "-m", "benchmarks.study.step", name, str(length)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if ran.returncode and REFUSAL in ran.stderr:
        return None
    if ran.returncode:
        raise RuntimeError(f"a step of {name} at {length} tokens failed: {ran.stderr.strip()}")
    return int(ran.stdout)


def main(name: str, length: int) -> None:
    """Print by how many bytes a step lets this process grow, after a small one that loads what all steps need."""
    limit = int(SHARE_OF_MEMORY * psutil.virtual_memory().available)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    step, samples = Step(kernels()[name]), inputs(length)
    step(inputs(WARM_UP_LENGTH))
    print(growth(lambda: step(samples)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
