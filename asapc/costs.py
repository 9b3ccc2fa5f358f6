"""Estimates what an operator costs on the target runtime.

The estimate is a sum of units of work, each times milliseconds that `python -m benchmarks.costs` has measured. They
were measured once and are kept in `costs.json`, rather than anew in each compilation, so that a plan does not hang on
the noise of a machine: the same checkpoint gives the same model, byte for byte.
"""

import json
from functools import cache
from math import log2
from pathlib import Path
from typing import NamedTuple

from torch import nn

from asapc.artifacts import Site
from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual

MODEL = Path(__file__).parent / "costs.json"


class Shape(NamedTuple):
    """Sizes of one call of an operator."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int


def work(shape: Shape, module: nn.Module, masked: bool = False, transposed: bool = False) -> dict[str, float]:
    """How many units of each kind of work an operator takes.

    Args:
        shape: sizes of the call.
        module: a `Sinkhorn` or a `SlicedDual`.
        masked: whether it leaves masked entries out.
        transposed: whether it gets scores that have to be transposed first.

    Raises:
        TypeError: it is another module.
    """
    matrices = shape.batch * shape.heads
    entries = matrices * shape.queries * shape.keys
    passes = int(masked) + int(transposed)
    total: dict[str, float] = {"call": 1, "product": entries * 2 * shape.head_dim, "softmax": entries}
    if isinstance(module, Sinkhorn):
        steps = module.half_steps - 1
        passes += 3 * module.wide
    elif isinstance(module, SlicedDual):
        steps = module.half_steps - module.wide
        passes += module.wide  # the bias
        points, others = (shape.queries, shape.keys) if module.turned else (shape.keys, shape.queries)
        coordinates = matrices * (points + others) * module.query_basis.shape[-1]
        total |= {
            "estimate": 1,
            "coordinate": coordinates,
            "project": coordinates * shape.head_dim,
            "hinge": matrices * points * module.knots[0].numel(),
            "sort": matrices * module.slices * sum(n * log2(max(n, 2)) for n in (points, others)),
        }
    else:
        raise TypeError(f"no cost is known of a {type(module).__name__}")
    return total | {"pass": entries * passes, "half_step": steps, "vector": matrices * steps, "matvec": entries * steps}


@cache
def unit_costs() -> dict[str, float]:
    """Milliseconds a unit of each kind of work, as measured."""
    costs: dict[str, float] = json.loads(MODEL.read_text())["milliseconds"]
    return costs


def estimate(site: Site, module: nn.Module, batch: int) -> float:
    """Milliseconds that an operator takes for a batch; for comparing operators, not for promising latencies."""
    shape = Shape(batch, site.heads, site.queries, site.keys, site.head_dim or 1)
    costs = unit_costs()
    transposed = bool(module.turned) and not site.product
    return sum(count * costs[kind] for kind, count in work(shape, module, site.masked, transposed).items())
