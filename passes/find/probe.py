"""Decides by numbers whether a region that maps scores to a plan is Sinkhorn scaling, and which.

It is exactly when, for some scale per head:

1. log(plan) - scale * scores is a row vector plus a column vector: zero after double centring;
2. on sharp random scores, in float64, the region returns what the reference loop returns after T
   half-steps from one axis or the other, for one T; and so it does on the real scores.

Equal scores give the outer product of the marginals, so the marginals are read off the response to these. The
region is a function here: nothing in this file depends on graphs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf

import torch
from torch import Tensor

from asapc.ops.c_transform import plan as plan_of
from asapc.ops.scaling import MIN_LIVE
from asapc.ops.sinkhorn import sinkhorn_duals, sinkhorn_iterates
from asapc.types.site import Axis, Loop

MAX_HALF_STEPS = 200  # where no structure says how many there can be
# Relative, in float64: another order of the same operations stays far below these, another algorithm far above.
DECOMPOSITION_TOLERANCE = 1e-6
ROUNDING = 1e-12
MARGINAL_TOLERANCE = 1e-6
EXACT_TOLERANCE, DISTINCT = 1e-6, 10.0  # of plans of random scores, and how many times that tells two plans apart
# On the real scores: leaves room for small constants in the divisors.
PLAN_TOLERANCE = 1e-5
# Relative difference that the plan of the model may have from the loop in float64: rounding of a long loop in float32.
# Beyond it the result depends on rounding, as with masks of -1e9, beside which float32 loses the scores.
PRECISION_TOLERANCE = 1e-2
SHARPNESS = (4.0, 32.0)  # standard deviations of the random scores
FAR_SHARPNESS, SHIFTS = (300.0, 3000.0), (-250.0, 250.0)
# Scores that fall into two groups of rows and columns, this far apart, converge slowly: many half-steps show.
BLOCKS = (1.5, 2.5, 3.5, 4.5, 5.5)
MAX_COUNTED_HEADS = 2  # this many heads are enough to count half-steps
NOTHING = "there is nothing to change"
PLAIN_LOOP = (
    "if it is meant to be Sinkhorn, train with the plain loop: exp of the scores, not sigmoid, ReLU or squares, then "
    "rows and columns scaled in turn and nothing else, to the same masses in all samples"
)
# Nearness of a softmax, which is no near miss, and of a start whose mask is applied after it.
SOFTMAX, MASKED_LATER = -2, 1

Masses = tuple[Tensor | None, Tensor | None]  # of rows and of columns


class NotSinkhorn(Exception):
    """The reason why a region is not Sinkhorn scaling, or not one that asapc can compile.

    Args:
        reason: what was expected and what was observed.
        hint: what the user can change.
        nearness: how far the probe got; of several starts the one that got farthest gives the reason.
        untold: names of nodes that do not vary on the samples; other samples may show more.
    """

    def __init__(self, reason: str, hint: str = NOTHING, nearness: int = 0, untold: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.hint, self.nearness, self.untold = hint, nearness, untold


@dataclass(frozen=True, eq=False)
class Live:
    """Which rows (B, H, N, 1) and columns (B, H, 1, M) of a plan hold mass, as 0 and 1 in float64."""

    rows: Tensor
    columns: Tensor

    @property
    def cells(self) -> Tensor:
        """(B, H, N, M), true where both row and column are live."""
        return (self.rows * self.columns).bool()

    @property
    def masked(self) -> bool:
        """Whether any row or column is not live."""
        return not bool(self.rows.all() and self.columns.all())


def find_scale(scores: Tensor, plan: Tensor) -> tuple[Tensor, Live]:
    """Run the first test: find the scale (H,) for which log(plan) - scale * scores is a row plus a column vector.

    Args:
        scores: (B, H, N, M), float64.
        plan: (B, H, N, M), float64.

    Returns:
        The scale, and which rows and columns are live.

    Raises:
        NotSinkhorn: there is no such scale.
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
            "the scores are constant on the samples, so the loop cannot be identified", "use other samples"
        )
    scale = (log_plan * centred).sum(dim=(0, 2, 3)) / energy
    residual = difference(scale[:, None, None] * centred, log_plan)
    if torch.linalg.vector_norm(log_plan) <= ROUNDING * torch.linalg.vector_norm(logs):
        raise NotSinkhorn("the plan is the outer product of two vectors and otherwise does not depend on the scores")
    if residual > DECOMPOSITION_TOLERANCE:
        raise NotSinkhorn(
            "log(plan) should be a multiple of the scores plus row and column terms; "
            f"the relative residual is {amount(residual)}",
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
    """Return the rows and columns that hold mass.

    Raises:
        NotSinkhorn: an entry is negative or not finite, or zero where both its row and its column hold mass.
    """
    if not bool(torch.isfinite(plan).all()):
        raise NotSinkhorn(
            "the plan holds NaN or infinity on the samples", "use samples on which the model returns finite values"
        )
    if bool((plan < 0).any()):
        raise NotSinkhorn("the plan has negative entries")
    positive = plan > 0
    live = Live(positive.any(dim=-1, keepdim=True).double(), positive.any(dim=-2, keepdim=True).double())
    if not torch.equal(positive, live.cells):
        if is_causal(plan):
            raise NotSinkhorn(
                "the plan is strictly causal; a doubly-stochastic causal plan is the identity, so there is no "
                "Sinkhorn loop to keep",
                "use softmax for causal attention",
            )
        zeros = (~positive).double().mean().item()
        raise NotSinkhorn(
            f"{zeros:.1%} of the plan is zero, and not in whole rows and columns: the plan is not an exponential of "
            "the scores, or the mask is not key padding",
            "mask the scores before the loop, whole keys or queries, or so that no row or column is ever empty, as in "
            "a window; use exp instead of ReLU, and softmax for causal and top-k masks",
        )
    return live


def is_causal(plan: Tensor) -> bool:
    """Return whether a plan leaves out what comes later, or what comes earlier, and nothing else as a whole."""
    positive = plan > 0
    square = plan.shape[-2] == plan.shape[-1]
    return square and any(
        not bool(half.triu(1).any()) and bool(half.tril(-1).any()) for half in (positive, positive.transpose(-1, -2))
    )


def never_empty(plan: Tensor) -> bool:
    """Return whether each row and column of a plan has an entry that is positive in all samples and heads.

    Such are windows, and bins for what matches nothing. The best of each row may leave a column empty on other inputs.
    """
    positive = (plan > 0).all(dim=1).all(dim=0)
    return bool(positive.any(dim=-1).all() and positive.any(dim=-2).all())


def probe(
    scores: Tensor,
    plan: Tensor,
    scale: Tensor,
    live: Live,
    respond: Callable[[Tensor], Tensor],
    most: int = MAX_HALF_STEPS,
    in_range: bool = False,
) -> Loop:
    """Run the second test, after `find_scale`: count half-steps, and read off axes and marginals.

    Args:
        scores: real scores (B, H, N, M), float64, at least one sample not wholly masked.
        plan: the real plan.
        scale: from `find_scale`.
        live: from `find_scale`.
        respond: the region, scores to plan.
        most: no loop of more half-steps is looked for.
        in_range: whether the region stays in range on any scores.

    Raises:
        NotSinkhorn: no loop gives these plans.
    """
    cells, factor = live.cells, scale[:, None, None]
    (half_steps, last), masses = respond_to_noise(scores, factor, live, respond, most, in_range)
    mass = masses[0] if last == "rows" else masses[1]
    if mass is None:
        raise NotSinkhorn(f"the sums of the plan's {last} differ between samples or heads", PLAIN_LOOP, 2)
    if half_steps == 1:
        raise NotSinkhorn(f"one half-step on {last} is softmax, which is as cheap as it gets", nearness=SOFTMAX)
    row_mass, column_mass = (torch.ones(1, dtype=torch.float64) if m is None else m for m in masses)
    scaled = torch.where(cells, scores * factor, -inf)
    duals = sinkhorn_duals(scaled, half_steps, last, row_mass, column_mass)
    if (error := difference(plan, plan_of(scaled, *duals))) > PLAN_TOLERANCE:
        raise NotSinkhorn(
            f"on random scores this is Sinkhorn with {half_steps} half-steps, but on the real ones it differs by "
            f"{amount(error)}",
            PLAIN_LOOP,
            nearness=2,
        )
    _, heads, queries, keys = scores.shape
    return Loop(half_steps, last, heads, queries, keys, scale, row_mass, column_mass, live.masked)


def respond_to_noise(
    scores: Tensor, factor: Tensor, live: Live, respond: Callable[[Tensor], Tensor], most: int, in_range: bool
) -> tuple[tuple[int, Axis], Masses]:
    """Count half-steps on random scores, and read the masses off the response to equal ones.

    A converged loop looks alike for many counts, one that still moves does not: after scores of two kinds come others
    on which loops converge ever more slowly, until the count is certain.

    Args:
        scores: real scores (B, H, N, M), which stay where they are masked.
        factor: scale (H, 1, 1).
        live: rows and columns that hold mass.
        respond: the region, scores to plan.
        most: no loop of more half-steps is looked for.
        in_range: whether the region stays in range on any scores.

    Returns:
        Number of half-steps and last axis, and the masses of rows and columns as `marginals` gives them.

    Raises:
        NotSinkhorn: no loop gives these plans.
    """
    cells = live.cells
    # Scores are random in the sample with most cells, and equal, for the marginals, in that with the next most.
    fullest = cells.flatten(1).sum(dim=1).argsort(descending=True, stable=True).tolist()
    noisy = fullest[0]
    flat = fullest[1] if len(fullest) > 1 and bool(cells[fullest[1]].any()) else noisy
    sample, counted = slice(noisy, noisy + 1), slice(0, MAX_COUNTED_HEADS)
    count: tuple[int, Axis] | None = None
    certain = False
    masses: Masses = (None, None)
    responses: list[tuple[Tensor, Tensor]] = []
    for noise, always in noises(scores.shape, in_range):
        if certain and not always:
            break
        if flat != noisy:
            noise[flat] = 0
        response = respond(torch.where(cells, noise / factor, scores))
        if not bool(torch.isfinite(response).all()):
            continue  # the region's own form leaves the range of float64
        if not responses:
            equal = response if flat != noisy else respond(torch.where(cells, 0.0, scores))
            masses = marginals(equal, live, slice(flat, flat + 1))
        random_scores = torch.where(cells, noise, -inf)[sample]
        responses.append((random_scores, response[sample]))
        if not certain:
            match = count_half_steps(random_scores[:, counted], response[sample, counted], masses, most)
            if match is None:
                raise no_loop(most)
            (steps, last), certain = match
            if count is None or certain or steps > count[0]:
                count = steps, last
    if count is None:
        raise no_loop(most)
    for random_scores, response in responses:
        duals = sinkhorn_duals(random_scores, *count, *masses)
        if difference(plan_of(random_scores, *duals), response) > EXACT_TOLERANCE:
            raise no_loop(most)
    return count, masses


def noises(shape: Sequence[int], in_range: bool) -> Iterator[tuple[Tensor, bool]]:
    """Yield random scores of a shape (B, H, N, M), and whether loops are to be tried on them in any case.

    What acts on large scores only, or on large duals, shows on far larger ones: as far as floats go, sharper scores
    where the region stays in range on any, and else scores that are all small or all large.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    for sharpness in (*SHARPNESS, *(FAR_SHARPNESS if in_range else ())):
        yield sharpness * noise, True
    for shift in () if in_range else SHIFTS:
        yield SHARPNESS[-1] * noise + shift, True
    signs = [1.0 - 2.0 * (torch.arange(size, dtype=torch.float64) % 2) for size in shape[-2:]]
    for distance in BLOCKS:
        yield distance * torch.outer(*signs) + noise, False


def require_precision(plan: Tensor, exact: Tensor) -> None:
    """Raise NotSinkhorn if the plan of the model differs from that of its loop in float64."""
    if (error := difference(plan, exact)) > PRECISION_TOLERANCE:
        raise NotSinkhorn(
            f"in the model's precision the plan differs by {amount(error)} from the plan in float64",
            "mask with -inf, and leave masked entries out of every step",
            nearness=3,
        )


def no_loop(most: int) -> NotSinkhorn:
    """Return the reason for a region that has the right form only."""
    return NotSinkhorn(
        f"log(plan) has the right form, but no loop of up to {most} half-steps gives this plan for other scores",
        PLAIN_LOOP,
        nearness=2,
    )


def marginals(response: Tensor, live: Live, sample: slice) -> Masses:
    """Read row and column masses off a region's response to equal scores in one sample.

    Returns:
        (1,) where all are equal; (N,) or (M,) where they are the same in all heads; else None, as where masks
        differ between samples. An axis of None that is not normalised last counts as uniform.

    Raises:
        NotSinkhorn: the response to equal scores is not an outer product.
    """
    flat = response[sample]
    rows, columns = flat.sum(dim=-1, keepdim=True), flat.sum(dim=-2, keepdim=True)
    total = rows.sum(dim=-2, keepdim=True)
    if difference(rows * columns / total, flat) > MARGINAL_TOLERANCE:
        raise NotSinkhorn("equal scores should give the outer product of the marginals, but do not", PLAIN_LOOP, 2)

    def mass(sums: Tensor, weights: Tensor, dim: int) -> Tensor | None:
        nonzero = sums[weights[sample].bool()]
        if difference(nonzero.mean().expand_as(nonzero), nonzero) < MARGINAL_TOLERANCE:
            return nonzero.mean().reshape(1)
        vector = sums[0, 0].flatten()
        same = difference(vector.reshape(sums[0, 0].shape).expand_as(sums), sums) < MARGINAL_TOLERANCE
        return vector if same and not live.masked else None

    return mass(rows, live.rows, -1), mass(columns, live.columns, -2)


def count_half_steps(scores: Tensor, plan: Tensor, masses: Masses, most: int) -> tuple[tuple[int, Axis], bool] | None:
    """Return the first (T, last axis) that gives a plan, and whether the loop still moves there: T is certain then."""
    axes: tuple[Axis, Axis] = ("rows", "columns")
    for first in axes:
        loop = enumerate(sinkhorn_iterates(scores, first, *masses), start=1)
        for step, (axis, f, g) in islice(loop, most):
            if difference(plan_of(scores, f, g), plan) < EXACT_TOLERANCE:
                next(loop)  # two half-steps later the same axis is the last
                _, (_, f, g) = next(loop)
                return (step, axis), difference(plan_of(scores, f, g), plan) > DISTINCT * EXACT_TOLERANCE
    return None


def double_centre(matrix: Tensor, live: Live) -> Tensor:
    """Subtract the means of live rows and columns; a row plus a column vector becomes zero, as do cells not live."""
    columns, rows = live.columns, live.rows
    matrix = matrix - (matrix * columns).sum(dim=-1, keepdim=True) / columns.sum(dim=-1, keepdim=True).clamp_min(1)
    matrix = matrix - (matrix * rows).sum(dim=-2, keepdim=True) / rows.sum(dim=-2, keepdim=True).clamp_min(1)
    return matrix * rows * columns


def difference(a: Tensor, b: Tensor) -> float:
    """Return the norm of a - b over the norm of b; NaN counts as infinite."""
    error = (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()
    return error if error == error else inf  # NaN differs from itself


def amount(error: float) -> str:
    """Format a `difference`, in words where it is infinite."""
    return f"{error:.1e}" if error < inf else "more than can be measured"
