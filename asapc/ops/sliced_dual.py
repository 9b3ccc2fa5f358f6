"""The sliced-dual operator: a plan whose dual is estimated, not iterated.

Queries and keys are projected on a few directions; what one-dimensional transport says about each, exactly by sorting
(`potentials.py`) or in closed form, goes through a linear map per head to an estimate of a dual; a few half-steps
(`c_transform.py`) rebuild the plan. After ASAP, arXiv 2605.12879. asapc's own are the balanced basis, the features
without a sort, the fitted closure steps, and the side: ASAP estimates the dual of the queries and takes two half-steps
from there. The dual of the keys is a bias of an ordinary softmax, which every runtime has fused, and that softmax is
one half-step more (docs/method.md).
"""

import torch
from torch import nn

from asapc.artifacts import Axis, SlicedDualParams
from asapc.ops.c_transform import column_step, plan, row_step
from asapc.ops.potentials import potentials, potentials_ref
from asapc.ops.scaling import LOWEST_LIVE, column_scaling, row_scaling, row_softmax, scaled_plan
from asapc.ops.sinkhorn import sinkhorn_duals, weigh
from asapc.shapes import check_shape

# Below this variance a projected coordinate counts as constant, and its features as zero.
MIN_VARIANCE = 1e-12
FIRST_HALF_STEPS = 3  # rows (the softmax), columns, rows; each closure step adds two


def project(points: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Coordinates (B, H, D, N) of points (B, H, N, D) in a basis (H, D, D) whose columns are directions.

    Points come last, here and in all that follows, since what is done to a coordinate is done to all points alike.
    """
    return basis.transpose(-1, -2) @ points.transpose(-1, -2)


def live_mask(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 where a row or column takes part and 0 where it is masked: (B, H, 1, N) and (B, H, 1, M), of scores' dtype."""
    live = scores >= LOWEST_LIVE
    rows = live.any(dim=-1, keepdim=True).transpose(-1, -2)
    return rows.to(scores.dtype), live.any(dim=-2, keepdim=True).to(scores.dtype)


def mean(values: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Mean over the last axis, of what is live."""
    if live is None:
        return values.mean(dim=-1, keepdim=True)
    return (values * live).sum(dim=-1, keepdim=True) / live.sum(dim=-1, keepdim=True).clamp_min(1)


def spread(centred: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Standard deviation over the last axis of values less their mean, of what is live; never zero."""
    return mean(centred * centred, live).clamp_min(MIN_VARIANCE).sqrt()


def dual_features(
    x: torch.Tensor,
    y: torch.Tensor,
    slices: int,
    knots: torch.Tensor,
    live_x: torch.Tensor | None = None,
    live_y: torch.Tensor | None = None,
) -> torch.Tensor:
    """Functions of the points x from which their dual, against the points y, is estimated.

    In the order of the features' axis:

    - `slices` exact potentials of the first coordinates; 0 where there is a mask;
    - `bquad`, one for each coordinate: the potential between two Gaussians in one dimension,
      -(sd(y) / sd(x)) / 2 * (x - mean x)^2, no sort needed;
    - `mean`: -x.mean(y), the term of every dual that the mean of y causes;
    - `hinges` in the first coordinates: sd(y) * relu(x - mean x - knot * sd(x)). What a one-dimensional potential
      differs by from a parabola is convex (Brenier), and sums of hinges are what is convex and piecewise linear.

    Args:
        x: coordinates of the points that the dual belongs to, (B, H, D, N), in a balanced basis.
        y: coordinates of the points on the other side, (B, H, D, M), so that the sum of x * y over D is the score.
        slices: number of coordinates, from the first, whose exact potential is taken.
        knots: (H, C, P) places of P hinges in each of the first C coordinates, in standard deviations.
        live_x: see `live_mask`; None where nothing is masked.
        live_y: the same.

    Returns:
        (B, H, F, N), in units of the scores, each function determined up to a constant over N.
    """
    x, y_mean = x - mean(x, live_x), mean(y, live_y)
    x_spread, y_spread = spread(x, live_x), spread(y - y_mean, live_y)
    bquad = -0.5 * (y_spread / x_spread) * x * x
    towards_mean = -(x * y_mean).sum(dim=-2, keepdim=True)
    groups = [*sorted_potentials(x, y, slices), bquad, towards_mean]
    if knots.numel():
        scales = y_spread[..., : knots.shape[-2], :].repeat_interleave(knots.shape[-1], dim=-2)
        groups.append(scales * hinges(x, x_spread, knots))
    features = torch.cat(groups, dim=-2)
    return features if live_x is None else features * live_x


def estimate(
    x: torch.Tensor,
    y: torch.Tensor,
    slices: int,
    knots: torch.Tensor,
    weights: torch.Tensor,
    live_x: torch.Tensor | None = None,
    live_y: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights (H, S, F) times the features: (B, H, S, N). The arguments are those of `dual_features`.

    What depends on a sample's moments multiplies the weights, which are few, and not the points.
    """
    x, y_mean = x - mean(x, live_x), mean(y, live_y)
    x_spread, y_spread = spread(x, live_x).transpose(-1, -2), spread(y - y_mean, live_y).transpose(-1, -2)
    sizes = (slices, x.shape[-2], 1, knots[0].numel())
    of_slices, of_parabolas, of_mean, of_hinges = weights.split(sizes, dim=-1)
    total = (-0.5 * (y_spread / x_spread) * of_parabolas) @ (x * x) - (of_mean * y_mean.transpose(-1, -2)) @ x
    for sliced in sorted_potentials(x, y, slices):
        total = total + of_slices @ sliced
    if knots.numel():
        scales = y_spread[..., : knots.shape[-2]].repeat_interleave(knots.shape[-1], dim=-1)
        total = total + (of_hinges * scales) @ hinges(x, x_spread.transpose(-1, -2), knots)
    return total if live_x is None else total * live_x


def sorted_potentials(x: torch.Tensor, y: torch.Tensor, slices: int) -> list[torch.Tensor]:
    """Exact potentials (B, H, slices, N) of the first coordinates, as a list of one; of none without slices."""
    return [potentials(x[..., :slices, :], y[..., :slices, :])] if slices else []


def hinges(centred: torch.Tensor, x_spread: torch.Tensor, knots: torch.Tensor) -> torch.Tensor:
    """Hinges (B, H, C * P, N) of points less their mean (B, H, D, N), at knots (H, C, P) of their spread (B, H, D, 1)."""
    count = knots.shape[-2]
    places = knots.unsqueeze(-1) * x_spread[..., :count, :].unsqueeze(-2)  # B H C P 1
    return torch.relu(centred[..., :count, :].unsqueeze(-2) - places).flatten(-3, -2)


def dual_features_ref(x: torch.Tensor, y: torch.Tensor, slices: int, knots: torch.Tensor) -> torch.Tensor:
    """Float64 reference of `dual_features`, function by function: (B, H, F, N)."""
    x, y = x.double(), y.double()
    quadratic, hinged = [], []
    for i in range(x.shape[-2]):
        deviation = x[..., i, :] - x[..., i, :].mean(dim=-1, keepdim=True)
        spread_x = deviation.square().mean(dim=-1, keepdim=True).clamp_min(MIN_VARIANCE).sqrt()
        spread_y = y[..., i, :].var(dim=-1, keepdim=True, correction=0).clamp_min(MIN_VARIANCE).sqrt()
        quadratic.append(-0.5 * spread_y / spread_x * deviation**2)
        if i < knots.shape[-2]:
            for knot in knots[:, i].double().unbind(dim=-1):
                hinged.append(spread_y * (deviation - knot[:, None] * spread_x).clamp_min(0))
    sliced = [potentials_ref(x[..., i, :], y[..., i, :]) for i in range(slices)]
    towards_mean = -torch.einsum("bhdn,bhd->bhn", x - x.mean(dim=-1, keepdim=True), y.mean(dim=-1))
    return torch.stack([*sliced, *quadratic, towards_mean, *hinged], dim=-2)


def target_dual(scores: torch.Tensor, half_steps: int) -> torch.Tensor:
    """Dual (B, H, M) of the columns that an estimate has to hit: a loop's own, three half-steps before its end.

    From it the operator takes the same three half-steps as the loop does, so that the loop's plan is met exactly.

    Args:
        scores: (B, H, N, M) of a loop that ends on rows, -inf where masked.
        half_steps: of the loop, at least 3; for 3 the dual is 0.
    """
    if half_steps == FIRST_HALF_STEPS:
        return torch.zeros_like(scores[..., 0, :])
    return sinkhorn_duals(scores, half_steps - FIRST_HALF_STEPS, "columns")[1]


class SlicedDual(nn.Module):
    """A fitted sliced dual: a fixed-depth stand-in for a Sinkhorn loop.

    Told for a loop that ends on rows; one that ends on columns is the same with queries and keys exchanged. The first
    set of weights maps features of the keys to an estimate of their dual. From an estimate g follow two half-steps,
    f = rows(g) and columns(f), its *closure*. Each further set combines the features with all closures so far to the
    next estimate, a fitted closure step: an extrapolation with coefficients learned once that aims at the finite
    teacher, where plain extra iterations would drift to the converged plan (docs/method.md). The closure of the
    last estimate and one more half-step on rows give the plan.

    All of it works on one kernel, softmax(scores + first estimate): its rows sum to 1 and its columns nearly to what
    they should, so that scaling vectors stay near 1 whatever the scores.
    """

    def __init__(
        self, params: SlicedDualParams, last: Axis = "rows", masked: bool = False, mass: float = 1.0
    ) -> None:
        """Set up the operator.

        Args:
            params: what the fit found for this site; the operator takes its dtype.
            last: the axis that the last half-step normalises.
            masked: whether scores below `scaling.LOWEST_LIVE` are left out; only without slices.
            mass: what the last half-step normalises to.
        """
        super().__init__()
        self.slices, self.steps = params.slices, len(params.weights) - 1
        self.last, self.masked, self.mass = last, masked, mass
        self.register_buffer("query_basis", params.query_basis)
        self.register_buffer("key_basis", params.key_basis)
        self.register_buffer("knots", params.knots)
        if params.weights:
            # What all sets make of the features is one product.
            features = params.weights[0].shape[-1]
            self.register_buffer("feature_weights", torch.stack([w[:, :features] for w in params.weights], dim=-2))
            for step, weights in enumerate(params.weights[1:], start=1):
                self.register_buffer(f"closure_weights_{step}", weights[:, None, features:])  # H 1 step

    query_basis: torch.Tensor
    key_basis: torch.Tensor
    knots: torch.Tensor
    feature_weights: torch.Tensor

    @property
    def half_steps(self) -> int:
        """Half-steps over the scores that the operator takes."""
        return FIRST_HALF_STEPS + 2 * self.steps

    def orient(
        self, scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Exchange queries and keys of a loop that ends on columns, so that it ends on rows."""
        return (scores, queries, keys) if self.last == "rows" else (scores.transpose(-1, -2), keys, queries)

    def coordinates(self, queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coordinates of the keys and of the queries, of oriented arguments."""
        key_basis, query_basis = self.key_basis, self.query_basis
        if self.last == "columns":
            key_basis, query_basis = query_basis, key_basis
        return project(keys, key_basis), project(queries, query_basis)

    def scale_columns(
        self, scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Go through all steps up to the columns' last, of oriented arguments.

        Returns:
            The kernel (B, H, N, M), the scaling vector (B, H, 1, M) of its columns, and the closures
            (B, H, 1, M) of all estimates, 0 where masked.
        """
        live_rows, live_columns = live_mask(scores) if self.masked else (None, None)
        points = self.coordinates(queries, keys)
        estimates = estimate(*points, self.slices, self.knots, self.feature_weights, live_columns, live_rows)
        first = estimates[..., :1, :]
        kernel = row_softmax(scores + first, self.masked)
        v = column_scaling(kernel, kernel.new_ones(1, kernel.shape[-2]))
        closures = [close(first, v, live_columns)]
        for step in range(1, self.steps + 1):
            weights: torch.Tensor = getattr(self, f"closure_weights_{step}")
            dual = estimates[..., step : step + 1, :] + weights @ torch.cat(closures, dim=-2)
            relative = dual - first
            v = torch.exp(relative - relative.amax(dim=-1, keepdim=True))
            v = column_scaling(kernel, row_scaling(kernel, v))
            closures.append(close(first, v, live_columns))
        return kernel, v, closures

    def vectors(self, scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """What a next set of weights may combine: features and closures so far, (B, H, F + sets, M).

        N takes the place of M where the loop ends on columns.
        """
        scores, queries, keys = self.orient(scores, queries, keys)
        live_rows, live_columns = live_mask(scores) if self.masked else (None, None)
        points = self.coordinates(queries, keys)
        features = dual_features(*points, self.slices, self.knots, live_columns, live_rows)
        if self.steps < 0:
            return features
        _, _, closures = self.scale_columns(scores, queries, keys)
        return torch.cat([features, *closures], dim=-2)

    def forward(
        self, scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Plan @ values (B, H, N, E), or without values the plan (B, H, N, M).

        Args:
            scores: (B, H, N, M), in units of the temperature.
            queries: (B, H, N, D).
            keys: (B, H, M, D).
            values: (B, H, M, E).
        """
        kernel, v, _ = self.scale_columns(*self.orient(scores, queries, keys))
        u = weigh(row_scaling(kernel, v), self.mass)
        return scaled_plan(kernel, u, v, values, turned=self.last == "columns")


def close(first: torch.Tensor, v: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Dual (B, H, 1, M) that a scaling vector of the columns stands for; 0 where they are masked."""
    closure = first + torch.log(v)
    return closure if live is None else closure * live


def sliced_dual_plan_ref(
    scores: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    params: SlicedDualParams,
    last: Axis = "rows",
    mass: float = 1.0,
) -> torch.Tensor:
    """Float64 reference of `SlicedDual`'s plan: its definition in the log domain, nothing rescaled."""
    dims: dict[str, int] = {}
    check_shape(dims, scores, "B H N M")
    check_shape(dims, queries, "B H N D")
    check_shape(dims, keys, "B H M D")
    scores = scores.double()
    x = torch.einsum("bhnd,hdl->bhln", queries.double(), params.query_basis.double())
    y = torch.einsum("bhmd,hdl->bhlm", keys.double(), params.key_basis.double())
    if last == "columns":
        scores, x, y = scores.transpose(-1, -2), y, x
    vectors = list(dual_features_ref(y, x, params.slices, params.knots).unbind(dim=-2))
    g = torch.zeros(())
    for weights in params.weights:
        g = torch.einsum("hf,bhfm->bhm", weights.double(), torch.stack(vectors, dim=-2))
        g = column_step(scores, row_step(scores, g))
        vectors.append(g)
    made = mass * plan(scores, row_step(scores, g), g)
    return made if last == "rows" else made.transpose(-1, -2)
