"""The modules that candidates and selections stand for, and the rivals that a compiled model is compared with."""

from collections.abc import Mapping, Sequence

from torch import nn

from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual
from asapc.planning.costs import estimate
from asapc.types.choices import Candidate, Selection
from asapc.types.options import Lowering
from asapc.types.site import Site

Operator = Sinkhorn | SlicedDual

MASS_TOLERANCE = 1e-6  # a last marginal within this of the usual one is the usual one
# Bytes of a matrix of scores beyond which the fused form is taken where there is one, and takes no more than so many
# times as long.
MAX_MATRIX, MAX_SLOWER = 2**28, 3.0


def build(site: Site, candidate: Candidate, wide: frozenset[str] = frozenset()) -> Operator:
    """The module that a candidate stands for."""
    if candidate.params is not None:
        loop = site.loop
        mass = loop.row_mass if loop.last == "rows" else loop.column_mass
        usual_mass = usual(mass.item(), 1.0)
        return SlicedDual(candidate.params, loop.last, loop.masked, usual_mass, site.name in wide, candidate.lowering)
    return exact_operator(site, candidate.half_steps, site.name in wide, candidate.lowering)


def usual(mass: float, default: float) -> float:
    """A mass, or the usual one where it is that up to rounding."""
    return default if abs(mass / default - 1) <= MASS_TOLERANCE else mass


def exact_operator(
    site: Site, half_steps: int | None = None, wide: bool = False, lowering: Lowering = "materialised"
) -> Sinkhorn:
    """Scaling-form Sinkhorn of a site, of its own number of half-steps or of fewer (truncated)."""
    loop = site.loop
    default = 1.0 if loop.last == "rows" else loop.queries / loop.keys
    of_axes = {"rows": loop.row_mass, "columns": loop.column_mass}
    masses = {
        # On the axis that is not normalised last a common factor is of no consequence.
        f"{axis[:-1]}_mass": mass.to(site.wiring.dtype)
        for axis, mass in of_axes.items()
        if mass.numel() > 1 or (axis == loop.last and usual(mass.item(), default) != default)
    }
    steps, logarithm = half_steps or loop.half_steps, site.wiring.logarithm
    return Sinkhorn(steps, loop.last, **masses, masked=loop.masked, logarithm=logarithm, wide=wide, lowering=lowering)


def fusable(site: Site, module: Operator) -> bool:
    """Whether an operator has a fused form: attention on plain products, all rows and columns alike, rows last.

    Keys may be left out, the same for all rows.
    """
    product, attention = site.wiring.product, site.wiring.attention
    products = product is not None and ((product.is_scores and not site.loop.masked) or product.padding is not None)
    plain = products and attention is not None and site.loop.uniform and not site.wiring.logarithm
    usual_mass = getattr(module, "mass", 1.0) == 1.0 and getattr(module, "row_mass", None) is None
    return plain and usual_mass and module.last == "rows" and not module.wide


def lower(site: Site, module: Operator, batch: int, wanted: Lowering | None = None) -> Operator:
    """Give an operator its cheapest lowering for a batch, or another that is wanted, as far as it has that.

    The scores of large batches and long sequences are rather not made: as a matrix they take memory that softmax
    attention does not take. But each half-step makes them anew then, which many half-steps do not bear.
    """
    forms: tuple[Lowering, ...] = ("materialised", "fused") if fusable(site, module) else ("materialised",)
    too_large = batch * site.loop.heads * site.loop.queries * site.loop.keys * site.wiring.dtype.itemsize > MAX_MATRIX
    if wanted in forms:
        forms = (wanted,)
    costs: dict[Lowering, float] = {}
    for form in forms:
        module.lowering = form
        costs[form] = estimate(site, module, batch)
    if too_large and "fused" in costs:
        costs["fused"] /= MAX_SLOWER
    module.lowering = min(forms, key=costs.__getitem__)
    return module


def operators(sites: Sequence[Site], selection: Selection) -> dict[str, Operator]:
    """The modules that a selection stands for; sites that it keeps have none."""
    candidates = {site.name: selection.choices[site.name].candidate for site in sites}
    replaced = [site for site in sites if candidates[site.name].operator != "keep"]
    return {site.name: build(site, candidates[site.name], selection.wide) for site in replaced}


def rivals(
    sites: Sequence[Site], selection: Selection, batch: int, wanted: Lowering | None = None
) -> Mapping[str, Mapping[str, nn.Module]]:
    """What a compiled model is compared with, each a module for every site, by name, lowered as `lower` does.

    The teacher as written; exact Sinkhorn in scaling form; truncated Sinkhorn with as many half-steps as the
    compiled operator; softmax attention, the floor of what a replacement can cost.
    """
    steps = {site.name: selection.choices[site.name].candidate.half_steps for site in sites}
    found: dict[str, dict[str, Operator]] = {
        "exact": {s.name: exact_operator(s, wide=s.name in selection.wide) for s in sites},
        "truncated": {s.name: exact_operator(s, steps[s.name], s.name in selection.wide) for s in sites},
        "softmax": {s.name: Sinkhorn(1, masked=s.loop.masked, logarithm=s.wiring.logarithm) for s in sites},
    }
    lowered = {
        name: {site.name: lower(site, of_sites[site.name], batch, wanted) for site in sites}
        for name, of_sites in found.items()
    }
    return {"teacher": {}, **lowered}
