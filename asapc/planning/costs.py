"""Estimates what an operator costs on the target runtime.

The estimate sums units of work, each times the milliseconds a unit that a `CostModel` has. asapc carries those that
`python -m benchmarks.costs` fitted, and `asapc costs` measures others. They are kept in files, not measured in each
compilation, so that a selection does not depend on the noise of a machine: the same checkpoint gives the same model,
byte for byte.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from math import isfinite, log2
from pathlib import Path
from typing import Any, NamedTuple

from asapc.ops.amortised import AmortisedSinkhorn
from asapc.ops.sinkhorn import MAX_STEPS, Sinkhorn
from asapc.ops.sliced_dual import SlicedDual
from asapc.ops.small import SmallSinkhorn
from asapc.types.choices import Selection
from asapc.types.costs import CostModel, Provider
from asapc.types.site import Site


class Shape(NamedTuple):
    """Sizes of one call of an operator."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.heads} heads of {self.head_dim}, {self.queries} x {self.keys}"


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
    if isinstance(module, SmallSinkhorn):
        return total | small_work(shape, module, entries)
    if isinstance(module, Sinkhorn):
        steps = module.half_steps - 1  # the softmax is the first
        # To level the kernel on the other axis too, and to take up the scaling vectors.
        passes += module.wide * (3 + 2 * (steps // MAX_STEPS))
    else:
        in_kernel = module.wide or module.half_steps == 1
        steps = module.half_steps - in_kernel
        passes += in_kernel  # to add the dual to the scores
        total |= estimate_work(shape, module)
    half_steps = {"loop": min(steps, 1), "half_step": steps, "vector": matrices * steps, "matvec": entries * steps}
    return total | {"pass": entries * passes} | half_steps


def small_work(shape: Shape, module: SmallSinkhorn, entries: int) -> dict[str, float]:
    """Count the units of half-steps on small matrices, each a product with a constant and a division."""
    steps, spread = module.half_steps, 1 if module.interleaved else shape.queries * shape.keys
    products, passes = entries * (2 * shape.head_dim + steps * spread), entries * steps
    if isinstance(module, AmortisedSinkhorn):
        shapes = [getattr(module, f"weight_{number}").shape for number in range(module.layers)]
        matrices = shape.batch * shape.heads
        products += matrices * sum(out * into for out, into in shapes)
        passes += 2 * entries + matrices * sum(out for out, _ in shapes[:-1])
        steps += module.layers + 2  # operations that take about as long to start as a half-step
    return {"half_step": steps, "product": products, "pass": passes}


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
    # Beside that, passes of a single column pad and join their operands, and GPUs have slower kernels for them.
    total |= {"narrow_call": narrow, "narrow_softmax": entries * narrow}
    if isinstance(module, SlicedDual):
        total |= estimate_work(shape, module)
    return total | {"call": 1}


def shipped_file(provider: Provider, precision: str) -> Path:
    """Return where the costs stand that asapc carries for a provider and a precision."""
    name = "cpu" if provider == "cpu" else f"cuda-{precision}"
    return Path(__file__).parent / f"{name}.costs.json"


@cache
def shipped(provider: Provider = "cpu", precision: str = "float32") -> CostModel:
    """Return the costs that asapc carries: of a CPU, or of a GPU in float32 or float16."""
    content = json.loads(shipped_file(provider, precision).read_text())
    return CostModel(provider, precision, content["device"], content["milliseconds"], content["median_error"])


def share_of_exact(selection: Selection) -> float | None:
    """Return the estimated time of a selection's operators over that of exact forms; None where it keeps a loop."""
    exact = [c.cost for choice in selection.choices.values() for c in choice.front if c.operator == "exact"]
    costs = [choice.candidate.cost for choice in selection.choices.values()]
    comparable = len(exact) == len(costs) and all(map(isfinite, costs))
    return sum(costs) / sum(exact) if comparable else None


def estimate(site: Site, module: Sinkhorn | SlicedDual, batch: int, model: CostModel) -> float:
    """Estimate the milliseconds that an operator takes for a batch: to compare operators, not to promise latencies."""
    shape = Shape(batch, site.loop.heads, site.loop.queries, site.loop.keys, site.head_dim or 1)
    # A product of queries and keys can be computed transposed; scores that are read cannot.
    transposed = bool(module.turned) and not site.wiring.scores_are_product
    units = work(shape, module, site.loop.masked, transposed)
    return sum(count * model.milliseconds[kind] for kind, count in units.items())


def estimate_all(sites: Sequence[Site], modules: Mapping[str, Any], batch: int, model: CostModel) -> float:
    """Estimate the milliseconds that the operators of all sites take for a batch, by the site's name."""
    return sum(estimate(site, modules[site.name], batch, model) for site in sites)
