"""Loops that stop early, in all the ways to ask whether to, and their capture."""

import math
from pathlib import Path

import torch
from torch import nn

from asapc.capturing.capture import capture_code
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples

BOUND = 6
ROUNDING = 1e-6  # float32, the same operations


def lines_with(text: str, file: str = __file__) -> list[str]:
    """Sources "file:line" of a file's lines that hold a text."""
    lines = enumerate(Path(file).read_text().splitlines(), 1)
    return [f"{file}:{number}" for number, line in lines if text in line and "lines_with" not in line]


def loaded(module: nn.Module) -> LoadedModel:
    return LoadedModel(module.eval(), Path("model.pt"), "0" * 64, 0, None, None)


def captured(module: nn.Module, samples: Samples | None = None, **options):
    return capture_code(loaded(module), scores() if samples is None else samples, **options)


def scores(count: int = 40) -> Samples:
    generator = torch.Generator().manual_seed(1)
    return Samples({"x": 3 * torch.randn(count, 5, 5, generator=generator)})


def output(module: nn.Module, samples: Samples) -> torch.Tensor:
    with torch.no_grad():
        return module(*samples.inputs.values())


def half_steps(f: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One iteration of log-domain Sinkhorn: the row potential after next."""
    g = -torch.logsumexp(x + f, dim=-2, keepdim=True)
    return -torch.logsumexp(x + g, dim=-1, keepdim=True)


class Loop(nn.Module):
    """Sinkhorn potentials until `converged` says so, at most BOUND times; `tol` of -1 never stops."""

    def __init__(self, converged, tol: float = 1e9) -> None:
        super().__init__()
        self.converged, self.tol = converged, tol

    def forward(self, x):
        f = torch.zeros_like(x[..., :1])
        for _ in range(BOUND):
            f_old, f = f, half_steps(f, x)
            if self.converged((f - f_old).abs().amax(), f, f_old, self.tol):  # asks where a spelling gives a tensor
                break
        return x + f


# Ways to ask whether to stop; all stop at once, given a large tolerance.
SPELLINGS = {
    "item": lambda err, f, old, tol: err.item() < tol,
    "bool": lambda err, f, old, tol: err < tol,
    "swapped": lambda err, f, old, tol: tol > err,
    "method": lambda err, f, old, tol: err.lt(tol),
    "function": lambda err, f, old, tol: torch.less_equal(err, tol),
    "tensor on the right": lambda err, f, old, tol: err < torch.tensor(tol),
    "float": lambda err, f, old, tol: float(err) < tol,
    "float of an item": lambda err, f, old, tol: float(err.item()) < tol,
    "not": lambda err, f, old, tol: not err > tol,
    "not any": lambda err, f, old, tol: not ((f - old).abs() > tol).any(),
    "all": lambda err, f, old, tol: ((f - old).abs() < tol).all(),
    "all, then item": lambda err, f, old, tol: ((f - old).abs() <= tol).all().item(),
    "torch.all": lambda err, f, old, tol: torch.all((f - old).abs().flatten(1).amax(1) < tol),
    "logical_not": lambda err, f, old, tol: torch.logical_not(err >= tol),
    "invert": lambda err, f, old, tol: ~(err >= tol),
    "any of a pair": lambda err, f, old, tol: (err < tol) | (f.abs().amax() < tol),
    "and": lambda err, f, old, tol: err.item() < tol and f.abs().max().item() < 2 * tol,
    "mean": lambda err, f, old, tol: (f - old).abs().mean().item() < tol,
    "max": lambda err, f, old, tol: torch.max(torch.abs(f - old)) < tol,
    "max of a dimension": lambda err, f, old, tol: (f - old).abs().flatten(1).max(dim=1).values.max() < tol,
    "norm": lambda err, f, old, tol: torch.linalg.vector_norm(f - old) < tol,
    "relative": lambda err, f, old, tol: (f - old).norm() < tol * old.norm() + tol,
    "relative, divided": lambda err, f, old, tol: err / max(f.abs().max().item(), 1e-9) < tol,
    "allclose": lambda err, f, old, tol: torch.allclose(f, old, atol=max(tol, 0), rtol=0) and tol > 0,
    "allclose, method": lambda err, f, old, tol: f.allclose(old, atol=max(tol, 0), rtol=0) and tol > 0,
    "isclose": lambda err, f, old, tol: torch.isclose(f, old, atol=max(tol, 0)).all() and tol > 0,
    "count": lambda err, f, old, tol: ((f - old).abs() >= tol).sum() == 0,
    "count, item": lambda err, f, old, tol: ((f - old).abs() < tol).sum().item() == f.numel(),
    "double": lambda err, f, old, tol: err.double().cpu().item() < tol,
    "detach": lambda err, f, old, tol: err.detach().data.item() < tol,
    "math": lambda err, f, old, tol: math.log(err.item() + 1e-30) < (math.log(tol) if tol > 0 else -1e9),
    "is_nonzero": lambda err, f, old, tol: torch.is_nonzero(err < tol),
    "equal": lambda err, f, old, tol: torch.equal(f * (tol < 0), old * (tol < 0)) and tol > 0,
}


class While(nn.Module):
    def forward(self, x):
        f, err, count = torch.zeros_like(x[..., :1]), 1e9, 0
        while err > 0.5 and count < BOUND:
            f_old, f = f, half_steps(f, x)
            err, count = (f - f_old).abs().max(), count + 1
        return x + f


class Done(nn.Module):
    """Remembers which samples are done, in place."""

    def forward(self, x):
        f, done = torch.zeros_like(x[..., :1]), torch.zeros(x.shape[0], dtype=torch.bool)
        for _ in range(BOUND):
            f_old, f = f, half_steps(f, x)
            done |= (f - f_old).abs().flatten(1).amax(1) < 0.5
            if done.all():
                break
        return x + f
