"""The modules that candidates and plans stand for, and the rivals that a compiled model is compared with."""

from collections.abc import Sequence

from torch import nn

from asapc.artifacts import Site
from asapc.choices import Candidate, Plan
from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual

MASS_TOLERANCE = 1e-6  # a last marginal within this of the usual one is the usual one


def build(site: Site, candidate: Candidate, wide: frozenset[str] = frozenset()) -> nn.Module:
    """The module that a candidate stands for."""
    if candidate.params is not None:
        mass = site.row_mass if site.last == "rows" else site.column_mass
        return SlicedDual(candidate.params, site.last, site.masked, usual(mass.item(), 1.0), site.name in wide)
    return exact_operator(site, candidate.half_steps, site.name in wide)


def usual(mass: float, default: float) -> float:
    """A mass, or the usual one where it is that up to rounding."""
    return default if abs(mass / default - 1) <= MASS_TOLERANCE else mass


def exact_operator(site: Site, half_steps: int | None = None, wide: bool = False) -> nn.Module:
    """Scaling-form Sinkhorn of a site, of its own number of half-steps or of fewer (truncated)."""
    default = 1.0 if site.last == "rows" else site.queries / site.keys
    given = {"rows": site.row_mass, "columns": site.column_mass}
    masses = {
        # On the axis that is not normalised last a common factor is of no consequence.
        f"{axis[:-1]}_mass": mass.to(site.dtype)
        for axis, mass in given.items()
        if mass.numel() > 1 or (axis == site.last and usual(mass.item(), default) != default)
    }
    steps = half_steps or site.half_steps
    return Sinkhorn(steps, site.last, **masses, masked=site.masked, logarithm=site.logarithm, wide=wide)


def operators(sites: Sequence[Site], chosen: Plan) -> dict[str, nn.Module]:
    """The modules that a plan stands for; sites that it keeps have none."""
    candidates = {site.name: chosen.choices[site.name].candidate for site in sites}
    return {s.name: build(s, candidates[s.name], chosen.wide) for s in sites if candidates[s.name].operator != "keep"}


def rivals(sites: Sequence[Site], chosen: Plan) -> dict[str, dict[str, nn.Module]]:
    """What a compiled model is compared with, each a module for every site, by name.

    The teacher as written; exact Sinkhorn in scaling form; truncated Sinkhorn with as many half-steps as the
    compiled operator; softmax attention, the floor of what a replacement can cost.
    """
    steps = {site.name: chosen.choices[site.name].candidate.half_steps for site in sites}
    return {
        "teacher": {},
        "exact": {s.name: exact_operator(s, wide=s.name in chosen.wide) for s in sites},
        "truncated": {s.name: exact_operator(s, steps[s.name], s.name in chosen.wide) for s in sites},
        "softmax": {s.name: Sinkhorn(1, masked=s.masked, logarithm=s.logarithm) for s in sites},
    }
