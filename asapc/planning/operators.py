"""Builds the modules of candidates and selections, and the rivals that a compiled model is compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from asapc.ops.amortised import AmortisedSinkhorn
from asapc.ops.guarded import GuardedSinkhorn
from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual
from asapc.ops.small import SmallSinkhorn
from asapc.planning.costs import estimate, estimate_all
from asapc.types.choices import AmortisedParams, Candidate, Selection
from asapc.types.costs import CostModel
from asapc.types.options import Lowering
from asapc.types.site import Site

Operator = Sinkhorn | SlicedDual

MASS_TOLERANCE = 1e-6  # a last marginal within this of the usual one is the usual one
# From this many small matrices on they are interleaved, which takes twice as many operations, each with less to do.
# With fewer, starting operations is what takes the time.
MANY = 256
# Beyond this many bytes of scores the fused form may take this many times as long as the materialised one.
MAX_MATRIX, MAX_SLOWER = 2**28, 3.0


def build(site: Site, candidate: Candidate, wide: frozenset[str] = frozenset()) -> Operator:
    """Build the module of a candidate."""
    if isinstance(candidate.params, AmortisedParams):
        return amortised_operator(site, candidate.params, candidate.half_steps, candidate.lowering)
    if candidate.params is not None:
        loop, wide_site = site.loop, site.name in wide
        masses = masses_of(site, 1.0)
        return SlicedDual(
            candidate.params, loop.last, loop.masked, **masses, wide=wide_site, lowering=candidate.lowering
        )
    return exact_operator(site, candidate.half_steps, site.name in wide, candidate.lowering)


def usual(mass: float, default: float) -> float:
    """Return a mass, or the usual one where they differ by rounding alone."""
    return default if abs(mass / default - 1) <= MASS_TOLERANCE else mass


def masses_of(site: Site, default: float) -> dict[str, Tensor]:
    """Return the masses that an operator of a site needs, by the names of its arguments.

    Args:
        site: the site.
        default: what the operator normalises the last axis to by itself.
    """
    loop = site.loop
    of_axes = {"rows": loop.row_mass, "columns": loop.column_mass}
    return {
        # On the axis that is not normalised last a common factor cancels out.
        f"{axis[:-1]}_mass": mass.to(site.wiring.dtype)
        for axis, mass in of_axes.items()
        if mass.numel() > 1 or (axis == loop.last and usual(mass.item(), default) != default)
    }


def packs(site: Site) -> bool:
    """Return whether the exact form of a site scales small plans side by side, in range whatever the scores."""
    return site.loop.small and not (site.loop.masked or site.wiring.logarithm)


def exact_operator(
    site: Site, half_steps: int | None = None, wide: bool = False, lowering: Lowering = "materialised"
) -> Sinkhorn:
    """Build the scaling form of a site, of its own number of half-steps or of fewer (truncated)."""
    loop = site.loop
    masses = masses_of(site, 1.0 if loop.last == "rows" else loop.queries / loop.keys)
    steps, logarithm = half_steps or loop.half_steps, site.wiring.logarithm
    if packs(site):
        return SmallSinkhorn(steps, loop.last, (loop.queries, loop.keys), loop.guard, **masses, lowering=lowering)
    guard = loop.guard if steps == loop.half_steps else None
    if guard is not None:
        return GuardedSinkhorn(steps, loop.last, guard, **masses, masked=loop.masked, logarithm=logarithm)
    return Sinkhorn(steps, loop.last, **masses, masked=loop.masked, logarithm=logarithm, wide=wide, lowering=lowering)


def amortised_operator(
    site: Site, params: AmortisedParams, half_steps: int, lowering: Lowering = "materialised"
) -> AmortisedSinkhorn:
    """Build a network with so many half-steps after it in the place of a site that `packs`."""
    loop = site.loop
    masses = masses_of(site, 1.0 if loop.last == "rows" else loop.queries / loop.keys)
    size = loop.queries, loop.keys
    return AmortisedSinkhorn(params, half_steps, loop.last, size, loop.guard, **masses, lowering=lowering)


def softmax_operator(site: Site) -> Sinkhorn:
    """Build softmax attention in the place of a site."""
    return Sinkhorn(1, masked=site.loop.masked, logarithm=site.wiring.logarithm)


def softmax_cost(sites: Sequence[Site], batch: int, model: CostModel, lowering: Lowering | None = None) -> float:
    """Estimate the milliseconds that softmax attention takes at all sites."""
    modules = {site.name: lower(site, softmax_operator(site), batch, model, lowering) for site in sites}
    return estimate_all(sites, modules, batch, model)


def fusable(site: Site, module: Operator) -> bool:
    """Return whether an operator has a fused form: attention on plain products, rows last.

    Keys may be left out, the same for all rows.
    """
    product, attention = site.wiring.product, site.wiring.attention
    # Fused attention computes the scores itself: nothing but padding of keys may come between product and loop.
    products = product is not None and ((product.is_scores and not site.loop.masked) or product.padding is not None)
    plain = products and attention is not None and not site.wiring.logarithm
    plain = plain and not isinstance(module, GuardedSinkhorn | SmallSinkhorn)
    return plain and module.last == "rows" and not module.wide


def lowerings(site: Site, module: Operator) -> tuple[Lowering, ...]:
    """Return the forms that an operator has at a site."""
    if isinstance(module, SmallSinkhorn):
        return ("materialised", "interleaved") if site.loop.column_mass.numel() == 1 else ("materialised",)
    return ("materialised", "fused") if fusable(site, module) else ("materialised",)


def lower(site: Site, module: Operator, batch: int, model: CostModel, lowering: Lowering | None = None) -> Operator:
    """Set an operator's lowering for a batch, and return it: `lowering` where it has that form, else the cheapest.

    For large batches and long sequences the matrix of scores takes memory that softmax attention does not need. The
    fused form avoids it. But it computes the scores again in each half-step, which costs too much in long loops.
    """
    forms = lowerings(site, module)
    if "interleaved" in forms:
        # On a GPU the number of launches is what takes the time.
        many = batch * site.loop.heads >= MANY and model.provider == "cpu"
        forms = ("interleaved",) if many else ("materialised",)
    too_large = batch * site.loop.heads * site.loop.queries * site.loop.keys * site.wiring.dtype.itemsize > MAX_MATRIX
    if lowering in forms:
        forms = (lowering,)
    costs: dict[Lowering, float] = {}
    for form in forms:
        module.lowering = form  # which the estimate reads
        costs[form] = estimate(site, module, batch, model)
    if too_large and "fused" in costs:
        costs["fused"] /= MAX_SLOWER
    module.lowering = min(forms, key=costs.__getitem__)
    return module


def operators(sites: Sequence[Site], selection: Selection) -> dict[str, Operator]:
    """Build the modules of a selection; sites that it keeps have none."""
    candidates = {site.name: selection.choices[site.name].candidate for site in sites}
    return {
        site.name: build(site, candidates[site.name], selection.wide)
        for site in sites
        if candidates[site.name].operator != "keep"
    }


def alike(one: Mapping[str, nn.Module], other: Mapping[str, nn.Module]) -> bool:
    """Return whether the same operators stand at all sites."""
    return one.keys() == other.keys() and all(settings_of(one[name]) == settings_of(other[name]) for name in one)


def settings_of(operator: nn.Module) -> dict[str, Any]:
    """Return what tells an operator from others: its kind, its attributes and its tensors."""
    attributes = {name: value for name, value in vars(operator).items() if not name.startswith("_")}
    tensors = {name: tensor.tolist() for name, tensor in operator.state_dict().items()}
    return {"kind": type(operator), **attributes, **tensors}


def rivals(
    sites: Sequence[Site], selection: Selection, batch: int, model: CostModel, lowering: Lowering | None = None
) -> Mapping[str, Mapping[str, nn.Module]]:
    """Build the models that a compiled model is compared with, by name: a module for every site, lowered as by `lower`.

    The teacher as written; exact Sinkhorn in scaling form; truncated Sinkhorn with as many half-steps as the
    compiled operator; softmax attention, a lower bound on the cost of any replacement.
    """
    steps = {site.name: selection.choices[site.name].candidate.half_steps for site in sites}
    modules: dict[str, dict[str, Operator]] = {
        "exact": {s.name: exact_operator(s, wide=s.name in selection.wide) for s in sites},
        "truncated": {s.name: exact_operator(s, steps[s.name], s.name in selection.wide) for s in sites},
        "softmax": {s.name: softmax_operator(s) for s in sites},
    }
    for of_sites in modules.values():
        for site in sites:
            lower(site, of_sites[site.name], batch, model, lowering)
    return {"teacher": {}, **modules}
