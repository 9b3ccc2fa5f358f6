"""Estimates what an operator costs on the target runtime.

The estimate sums units of work, each times the milliseconds a unit that `python -m benchmarks.costs` measured. They are
kept in `costs.json`, not measured in each compilation, so that a selection does not depend on the noise of a machine:
the same checkpoint gives the same model, byte for byte.
"""

import json
from functools import cache
from math import isfinite, log2
from pathlib import Path
from typing import NamedTuple

from asapc.ops.sinkhorn import MAX_STEPS, Sinkhorn
from asapc.ops.sliced_dual import SlicedDual
from asapc.types.choices import Selection
from asapc.types.site import Site

MODEL = Path(__file__).parent / "costs.json"


class Shape(NamedTuple):
    """Sizes of one call of an operator."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int


def work(
    shape: Shape, module: Sinkhorn | SlicedDual, masked: bool = False, transposed: bool = False
) -> dict[str, float]:
    """Count the units of each kind of work that an operator takes.

    Args:
        shape: sizes of the call.
        module: the operator.
        masked: whether it leaves masked entries out.
        transposed: whether it gets scores that have to be transposed first.
    """
    matrices = shape.batch * shape.heads
    entries = matrices * shape.queries * shape.keys
    if module.lowering == "fused":
        return fused_work(shape, module, entries)
    passes = int(masked) + int(transposed)  # over the matrix of scores, beside those of the loop
    total: dict[str, float] = {"call": 1, "product": entries * 2 * shape.head_dim, "softmax": entries}
    if isinstance(module, Sinkhorn):
        steps = module.half_steps - 1  # the softmax is the first
        # To level the kernel on the other axis too, and to take up the scaling vectors.
        passes += module.wide * (3 + 2 * (steps // MAX_STEPS))
    else:
        in_kernel = module.wide or module.half_steps == 1
        steps = module.half_steps - in_kernel
        passes += in_kernel  # to add the dual to the scores
        total |= estimate_work(shape, module)
    return total | {"pass": entries * passes, "half_step": steps, "vector": matrices * steps, "matvec": entries * steps}


def estimate_work(shape: Shape, module: SlicedDual) -> dict[str, float]:
    """Count the units of estimating a dual, before any half-step."""
    matrices = shape.batch * shape.heads
    # The points whose dual is estimated, and those across.
    own, other = (shape.queries, shape.keys) if module.turned else (shape.keys, shape.queries)
    coordinates = matrices * (own + other) * module.query_basis.shape[-1]
    paired = 0 if module.pair_weights is None else module.pair_weights.shape[-1]
    return {
        "estimate": 1,
        "paired": min(paired, 1),
        "form": matrices * own * (module.steps + 1) * paired,
        "coordinate": coordinates,
        "project": coordinates * shape.head_dim,
        "hinge": matrices * own * module.knots[0].numel(),
        "sort": matrices * module.slices * sum(n * log2(max(n, 2)) for n in (own, other)),
    }


def fused_work(shape: Shape, module: Sinkhorn | SlicedDual, entries: float) -> dict[str, float]:
    """Count the units of an operator in fused passes: the last applies values, the others a single column."""
    # One channel more than the head has, for the dual, see `ops.fused`.
    narrow, channels = module.half_steps - 1, shape.head_dim + 1
    products = entries * (narrow * (channels + 1) + channels + shape.head_dim)
    total = {"fused_call": module.half_steps, "fused_product": products, "fused_softmax": entries * module.half_steps}
    if isinstance(module, SlicedDual):
        total |= estimate_work(shape, module)
    return total | {"call": 1}


@cache
def unit_costs() -> dict[str, float]:
    """Return the milliseconds that a unit of each kind of work takes, as measured."""
    costs: dict[str, float] = json.loads(MODEL.read_text())["milliseconds"]
    return costs


def share_of_exact(selection: Selection) -> float | None:
    """Return the estimated time of a selection's operators over that of exact forms; None where it keeps a loop."""
    exact = [c.cost for choice in selection.choices.values() for c in choice.front if c.operator == "exact"]
    costs = [choice.candidate.cost for choice in selection.choices.values()]
    comparable = len(exact) == len(costs) and all(map(isfinite, costs))
    return sum(costs) / sum(exact) if comparable else None


def estimate(site: Site, module: Sinkhorn | SlicedDual, batch: int) -> float:
    """Estimate the milliseconds that an operator takes for a batch: to compare operators, not to promise latencies."""
    shape = Shape(batch, site.loop.heads, site.loop.queries, site.loop.keys, site.head_dim or 1)
    costs = unit_costs()
    # A product of queries and keys can be computed transposed; scores that are read cannot.
    transposed = bool(module.turned) and not site.wiring.scores_are_product
    return sum(count * costs[kind] for kind, count in work(shape, module, site.loop.masked, transposed).items())
