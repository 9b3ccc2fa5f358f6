"""Decides by numbers whether a region that maps scores to a plan is Sinkhorn scaling, and which.

It is exactly when, for some scale per head,

1. log(plan) - scale * scores is a row vector plus a column vector: zero after double centring;
2. on sharp random scores, in float64, the region returns what the reference loop returns after T
   half-steps from one axis or the other, for one T; and so it does on the real scores.

Equal scores give the outer product of the marginals, so they are read off the region's answer to those. The
region is asked as a function: nothing here knows of graphs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from math import inf

import torch
from torch import Tensor

from asapc.ops.c_transform import plan as plan_of
from asapc.ops.scaling import MIN_LIVE
from asapc.ops.sinkhorn import sinkhorn_duals, sinkhorn_iterates
from asapc.types.site import Axis, Loop

MAX_HALF_STEPS = 200
# Relative, in float64: what a different order of the same operations costs stays far below these, and
# what a different algorithm costs far above.
DECOMPOSITION_TOLERANCE = 1e-6
ROUNDING = 1e-12
MARGINAL_TOLERANCE = 1e-6
# On the real scores: leaves room for the small constants that people add to divisors.
PLAN_TOLERANCE = 1e-5
# On random scores such constants can weigh more. A number of half-steps counts as told where the plan is met to
# this, or to CLOSE_TOLERANCE and no other number comes within a factor of DISTINCT.
EXACT_TOLERANCE, CLOSE_TOLERANCE, DISTINCT = 1e-6, 1e-2, 10.0
SHARPNESS = (4.0, 8.0, 16.0, 32.0)  # standard deviations of the random scores
HEADS_COUNTED = 2  # that many heads are enough to count half-steps
NOTHING = "nothing is to be done"
PLAIN_LOOP = (
    "if it is meant to be Sinkhorn, train with the plain loop: exp of the scores, no sigmoid, ReLU or squares, and "
    "then nothing but rows and columns scaled by turns, to the same masses in all samples"
)
MASKED_LATER = 1  # nearness of a start whose mask comes in after it


class NotSinkhorn(Exception):
    """Why a region is not Sinkhorn scaling, or not one that asapc can compile.

    Args:
        reason: what was expected and what was seen.
        hint: what the user can change.
        nearness: how far the probe got; of several starts the one that got farthest tells the reason.
        untold: names of nodes of which other samples may tell more.
    """

    def __init__(self, reason: str, hint: str = NOTHING, nearness: int = 0, untold: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.hint, self.nearness, self.untold = hint, nearness, untold


@dataclass(frozen=True, eq=False)
class Live:
    """Which rows (B, H, N, 1) and columns (B, H, 1, M) of a plan hold any mass, as 0 and 1 in float64."""

    rows: Tensor
    columns: Tensor

    @property
    def cells(self) -> Tensor:
        """(B, H, N, M), true where row and column are live."""
        return (self.rows * self.columns).bool()

    @property
    def masked(self) -> bool:
        """Whether any row or column is not."""
        return not bool(self.rows.all() and self.columns.all())


def find_scale(scores: Tensor, plan: Tensor) -> tuple[Tensor, Live]:
    """First test: scale (H,) for which log(plan) - scale * scores is a row plus a column vector, and what is live.

    Args:
        scores: (B, H, N, M), float64.
        plan: the same.

    Raises:
        NotSinkhorn: there is none.
    """
    live = find_live(plan)
    logs = torch.where(live.cells, plan, 1.0).log()
    log_plan = double_centre(logs, live)
    centred = double_centre(torch.where(live.cells, scores, 0.0), live)
    energy = centred.square().sum(dim=(0, 2, 3))
    if not bool(torch.isfinite(energy).all()):
        raise NotSinkhorn("the scores are infinite where the plan is not zero")
    if bool((energy == 0).any()):
        raise NotSinkhorn(
            "the scores are constant on the samples, so nothing can be told from them", "give other samples"
        )
    scale = (log_plan * centred).sum(dim=(0, 2, 3)) / energy
    residual = difference(scale[:, None, None] * centred, log_plan)
    if torch.linalg.vector_norm(log_plan) <= ROUNDING * torch.linalg.vector_norm(logs):
        raise NotSinkhorn("the plan is a row times a column and does not depend on the scores otherwise")
    if residual > DECOMPOSITION_TOLERANCE:
        raise NotSinkhorn(
            "log(plan) should be a multiple of the scores plus row and column terms; "
            f"{amount(residual)} of it is not, relative",
            PLAIN_LOOP,
        )
    dead = scores[~live.cells]
    dead_scale = scale[:, None, None].expand_as(scores)[~live.cells]
    if not bool((dead * dead_scale < MIN_LIVE).all()):
        raise NotSinkhorn(
            "the plan is zero where the scores are not masked",
            "mask the scores before the loop, with -inf or a large negative number",
            nearness=MASKED_LATER,
        )
    return scale, live


def find_live(plan: Tensor) -> Live:
    """Rows and columns with mass; everything in the cross of the two has to have some."""
    if not bool(torch.isfinite(plan).all()):
        raise NotSinkhorn("the plan holds NaN or infinity on the samples", "give samples on which the model works")
    if bool((plan < 0).any()):
        raise NotSinkhorn("the plan has negative entries")
    positive = plan > 0
    live = Live(positive.any(dim=-1, keepdim=True).double(), positive.any(dim=-2, keepdim=True).double())
    if not torch.equal(positive, live.cells):
        causal = plan.shape[-2] == plan.shape[-1] and not bool(positive.triu(1).any())
        if causal and bool(positive.tril(-1).any()):
            raise NotSinkhorn(
                "the plan is strictly causal; a doubly-stochastic causal plan is the identity, so there is no "
                "Sinkhorn loop to keep",
                "use softmax for causal attention",
            )
        zeros = (~positive).double().mean().item()
        raise NotSinkhorn(
            f"{zeros:.1%} of the plan is zero, and not whole rows and columns: not an exponential of scores, or "
            "a mask of another kind than key padding",
            "mask whole keys or queries only, the padding, and use exp in the place of ReLU; with causal, banded and "
            "top-k masks softmax is what there is",
        )
    return live


def probe(scores: Tensor, plan: Tensor, scale: Tensor, live: Live, respond: Callable[[Tensor], Tensor]) -> Loop:
    """Second test, after `find_scale`: count half-steps and read off axes and marginals.

    Args:
        scores: real scores (B, H, N, M), float64, one sample at least not wholly masked.
        plan: the real plan.
        scale: what `find_scale` gave.
        live: the same.
        respond: the region, scores to plan.

    Raises:
        NotSinkhorn: no loop gives these plans.
    """
    cells, factor = live.cells, scale[:, None, None]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(scores.shape, generator=generator, dtype=torch.float64)
    # Samples that are not wholly masked: scores are noise in one, and equal in another to read the marginals off.
    alive = cells.flatten(1).any(dim=1).nonzero().flatten().tolist()
    noisy, flat = alive[0], alive[-1]
    if flat != noisy:
        noise[flat] = 0
    found: tuple[int, Axis] | None = None
    masses: tuple[Tensor | None, Tensor | None] = (None, None)
    for sharpness in SHARPNESS:
        sharp = torch.where(cells, sharpness * noise, scores * factor)
        seen = respond(torch.where(cells, sharpness * noise / factor, scores))
        if not bool(torch.isfinite(seen).all()):
            break  # the region's own form leaves the range of float64
        if masses == (None, None):
            equal = seen if flat != noisy else respond(torch.where(cells, 0.0, scores))
            masses = marginals(equal, live, slice(flat, flat + 1))
        counted = slice(noisy, noisy + 1), slice(0, HEADS_COUNTED)
        matches = count_half_steps(torch.where(cells, sharp, -inf)[counted], seen[counted], masses)
        if matches is None:
            break
        found, still_moving = matches
        if still_moving:
            break
    if found is None:
        raise NotSinkhorn(
            "log(plan) has the right form, but no loop of up to "
            f"{MAX_HALF_STEPS} half-steps gives this plan for other scores",
            PLAIN_LOOP,
            nearness=2,
        )
    half_steps, last = found
    mass = masses[0] if last == "rows" else masses[1]
    if mass is None:
        raise NotSinkhorn(f"the {last} of the plan sum to something else in each sample or head", PLAIN_LOOP, 2)
    if half_steps == 1:
        raise NotSinkhorn(f"one half-step on {last} is softmax, which is as cheap as it gets", nearness=2)
    row_mass, column_mass = (torch.ones(1, dtype=torch.float64) if m is None else m for m in masses)
    scaled = torch.where(cells, scores * factor, -inf)
    duals = sinkhorn_duals(scaled, half_steps, last, row_mass, column_mass)
    if (error := difference(plan, plan_of(scaled, *duals))) > PLAN_TOLERANCE:
        raise NotSinkhorn(
            f"on random scores it is Sinkhorn of {half_steps} half-steps, on the real ones it differs by "
            f"{amount(error)}",
            PLAIN_LOOP,
            nearness=2,
        )
    _, heads, queries, keys = scores.shape
    return Loop(half_steps, last, heads, queries, keys, scale, row_mass, column_mass, live.masked)


def marginals(answer: Tensor, live: Live, sample: slice) -> tuple[Tensor | None, Tensor | None]:
    """Row and column masses from a region's answer to equal scores in one sample.

    Returns:
        (1,) where all are equal, (N,) or (M,) where they are not but are the same in all heads; None where
        masked samples differ, so that it takes the axis that is not normalised last to be uniform.

    Raises:
        NotSinkhorn: the answer to equal scores is not an outer product.
    """
    flat = answer[sample]
    rows, columns = flat.sum(dim=-1, keepdim=True), flat.sum(dim=-2, keepdim=True)
    total = rows.sum(dim=-2, keepdim=True)
    if difference(rows * columns / total, flat) > MARGINAL_TOLERANCE:
        raise NotSinkhorn("equal scores should give an outer product of marginals, and do not", PLAIN_LOOP, 2)

    def mass(sums: Tensor, weights: Tensor, dim: int) -> Tensor | None:
        used = sums[weights[sample].bool()]
        if difference(used.mean().expand_as(used), used) < MARGINAL_TOLERANCE:
            return used.mean().reshape(1)
        vector = sums[0, 0].flatten()
        same = difference(vector.reshape(sums[0, 0].shape).expand_as(sums), sums) < MARGINAL_TOLERANCE
        return vector if same and not live.masked else None

    return mass(rows, live.rows, -1), mass(columns, live.columns, -2)


def count_half_steps(
    scores: Tensor, seen: Tensor, masses: tuple[Tensor | None, Tensor | None]
) -> tuple[tuple[int, Axis], bool] | None:
    """First (T, last axis) whose plan is `seen`, and whether the loop still moves there: T is certain then."""
    axes: tuple[Axis, Axis] = ("rows", "columns")
    closest: list[tuple[float, int, Axis]] = []
    for first in axes:
        loop = enumerate(sinkhorn_iterates(scores, first, *masses), start=1)
        for step, (axis, f, g) in islice(loop, MAX_HALF_STEPS):
            error = difference(plan_of(scores, f, g), seen)
            closest.append((error, step, axis))
            if error < EXACT_TOLERANCE:
                next(loop)
                _, (_, f, g) = next(loop)
                return (step, axis), difference(plan_of(scores, f, g), seen) > DISTINCT * EXACT_TOLERANCE
    (error, step, axis), second = sorted(closest)[:2]
    if error < CLOSE_TOLERANCE and second[0] > DISTINCT * error:
        return (step, axis), True
    return None


def double_centre(matrix: Tensor, live: Live) -> Tensor:
    """Subtract the means of live rows and columns: zero there for a row plus a column vector, and zero elsewhere."""
    columns, rows = live.columns, live.rows
    matrix = matrix - (matrix * columns).sum(dim=-1, keepdim=True) / columns.sum(dim=-1, keepdim=True).clamp_min(1)
    matrix = matrix - (matrix * rows).sum(dim=-2, keepdim=True) / rows.sum(dim=-2, keepdim=True).clamp_min(1)
    return matrix * rows * columns


def difference(a: Tensor, b: Tensor) -> float:
    """Norm of a - b over the norm of b; nan counts as infinite."""
    error = (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()
    return error if error == error else inf


def amount(error: float) -> str:
    """A `difference`, in words where it is no number."""
    return f"{error:.1e}" if error < inf else "more than can be measured"
