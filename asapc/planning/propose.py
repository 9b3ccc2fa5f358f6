"""Proposes operators for each site: exact and truncated forms, and what is fitted: sliced duals and networks."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from math import inf

from asapc.backends.tensorrt.preflight import MAX_SORT
from asapc.config import CompileConfig
from asapc.ops.sliced_dual import bias_side, first_half_steps
from asapc.planning.amortise import amortise, why_not_amortised
from asapc.planning.calibrate import FitKey, calibrate
from asapc.planning.distributed import processes_sharing
from asapc.types.choices import SIDES, Candidate, FeatureSet, SlicedDualParams
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.types.teacher import Teacher

MAX_CLOSURE_STEPS = 5
MAX_EXACT_HALF_STEPS = 3  # an estimate is followed by as many, so that a loop this short cannot be beaten
TRUNCATED = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)  # half-steps
# Limits of what fits and choices look at: most scores of the largest site, fewest samples.
MAX_SCORES, MIN_SAMPLES = 2**27, 4
SELECTION_SHARE = 4  # one in four calibration samples chooses between candidates and is not fitted on


def propose(
    teacher: Teacher, config: CompileConfig, advance: Callable[[str], None] = lambda detail: None
) -> dict[str, list[Candidate]]:
    """Propose candidates by the site's name, without cost and fidelity; the exact form comes first, allowed or not.

    All processes that share the calibration must call it: sums over their samples meet in `distributed.total`.
    """
    sites = teacher.longest_sites
    candidates = {site.name: [Candidate("exact", site.loop.half_steps, inf)] for site in sites}
    if config.level < 2:
        return candidates
    for site in sites if "truncated" in config.kinds() else ():
        candidates[site.name] += [Candidate("truncated", t, inf) for t in TRUNCATED if t < site.loop.half_steps]
    small = [site for site in sites if "amortised" in config.kinds() and why_not_amortised(site) is None]
    if small:
        advance(f"training networks of {len(small)} sites")
        _, fitting = split(enough(teacher))
        for name, of_site in amortise(teacher.graph, small, fitting).items():
            candidates[name] += of_site
    sets = {site.name: feature_sets(site, config) for site in sites if why_not_sliced(site) is None}
    sliceable = [site for site in sites if sets.get(site.name)]
    if not sliceable:
        return candidates
    advance(f"fitting {len(sliceable)} sites")
    choosing, fitting = split(enough(teacher))
    fits = calibrate(teacher.graph, sets, sliceable, fitting, choosing, MAX_CLOSURE_STEPS, advance)
    for site in sliceable:
        for features in sets[site.name]:
            candidates[site.name] += sliced_duals(site, features, fits[FitKey(site.name, features)])
    return candidates


def sliced_duals(site: Site, features: FeatureSet, params: SlicedDualParams) -> Iterator[Candidate]:
    """Yield the sliced duals of one fit, one for each number of closure steps that is shorter than the loop."""
    first = first_half_steps(features.side, site.loop.last, features.one_pass)
    for steps in range(len(params.weights)):
        half_steps = first + 2 * steps
        if half_steps < site.loop.half_steps:
            yield Candidate("sliced_dual", half_steps, inf, None, truncate(params, steps))


def enough(teacher: Teacher) -> Samples:
    """Return as many calibration samples as a fit needs: few long ones, each of which has as many points as tokens."""
    most = max(MIN_SAMPLES, MAX_SCORES // teacher.graph.entries) * processes_sharing()
    return teacher.calibration[:most]


def split(samples: Samples) -> tuple[Samples, Samples]:
    """Split calibration samples into those that choose and those that are fitted."""
    at = len(samples) // SELECTION_SHARE
    return samples[:at], samples[at:]


def feature_sets(site: Site, config: CompileConfig) -> list[FeatureSet]:
    """List the feature sets that a site can have; none where it can have none of the kinds that are allowed.

    Masks, long sites and open lengths allow no sort, and heads of one axis no pairs.
    """
    sortable = not site.loop.masked and not config.dynamic and max(site.loop.queries, site.loop.keys) <= MAX_SORT
    slices = [s for s in config.slice_counts() if s == 0 or sortable]
    paired = (False, True) if (site.head_dim or 0) > 1 else (False,)
    sets = [FeatureSet(*values) for values in product(slices, config.pieces, SIDES, paired)]
    sets += [s._replace(one_pass=True) for s in sets if s.side == bias_side(site.loop.last)]
    return [features for features in sets if features.kind in config.kinds()]


def truncate(params: SlicedDualParams, steps: int) -> SlicedDualParams:
    """Keep the first `steps` closure steps: each was fitted without regard to those after it."""
    return replace(params, weights=params.weights[: 1 + steps], doubling=params.doubling[: 1 + steps])


def why_not_sliced(site: Site) -> str | None:
    """Return why a sliced dual cannot replace a site; None where it can."""
    if site.loop.half_steps <= MAX_EXACT_HALF_STEPS:
        return f"{site.loop.half_steps} half-steps are too few for an approximation to pay"
    if site.wiring.product is None or not bool((site.wiring.product.score_scale > 0).all()):
        return "its scores hold no product of queries and keys to slice"
    if site.loop.open_heads:
        return "its number of heads is open, and sliced duals are fitted head by head"
    if site.wiring.logarithm:
        return "it ends in the logarithm of a plan, which sliced duals do not serve yet"
    return None
