"""The sliced-dual operator: a plan whose dual is estimated, not iterated.

Queries and keys are projected on a few directions. Features from one-dimensional transport along each, exact by sorting
(`potentials.py`) or in closed form, go through a linear map per head to an estimate of a dual. A few half-steps
(`c_transform.py`) rebuild the plan. After ASAP, arXiv 2605.12879. asapc adds the balanced basis, the features without a
sort, the fitted closure steps, and the choice of the side: ASAP estimates the dual of the queries and takes two
half-steps from there. The dual of the keys is a bias of an ordinary softmax, which every runtime has fused, and that
softmax is one half-step more. Which side is more accurate for its cost depends on the site (docs/method.md).
"""

import math

import torch
from torch import nn

from asapc.ops.c_transform import column_step, plan, row_step
from asapc.ops.features import dual_features, dual_features_ref, estimate, live_mask, pair_matrices, pairs_of, project
from asapc.ops.fused import attend, half_step
from asapc.ops.scaling import MIN_LIVE, column_scaling, row_scaling, scaled_plan, start
from asapc.ops.shapes import check_shape
from asapc.ops.sinkhorn import scaled_duals, times
from asapc.types.choices import Side, SlicedDualParams
from asapc.types.options import Lowering
from asapc.types.site import Axis

# How far, as a natural logarithm, scaling vectors from estimates may fall below their largest entry. They reach it only
# far outside the calibrated range.
MAX_LOG = 60.0


def bias_side(last: Axis) -> Side:
    """Return the side whose dual is a bias of the softmax over the `last` axis."""
    return "keys" if last == "rows" else "queries"


def first_half_steps(side: Side, last: Axis, one_pass: bool = False) -> int:
    """Count the half-steps from an estimate of a side's dual to a plan whose `last` axis is normalised.

    The first normalises the other side's axis, the second the side's own. Each closure step adds two.

    Raises:
        ValueError: one pass from a side whose dual is no bias of the last softmax.
    """
    if not one_pass:
        return 3 if side == bias_side(last) else 2
    if side != bias_side(last):
        raise ValueError(f"one pass that ends on {last} needs the dual of the {bias_side(last)}")
    return 1


def target_dual(
    scores: torch.Tensor,
    half_steps: int,
    side: Side,
    last: Axis,
    one_pass: bool = False,
    row_mass: torch.Tensor | None = None,
    column_mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the target of an estimate: a loop's own dual, as many half-steps before its end as follow the estimate.

    From there the operator takes the same half-steps as the loop, and so reaches the loop's plan exactly. The logarithm
    of the side's own masses is left out, and added by the operator: they belong to places, which features do not see.

    Args:
        scores: (B, H, N, M), -inf where masked.
        half_steps: of the loop, at least as many as `first_half_steps`; for just as many the dual is 0.
        side: the points whose dual it is.
        last: the axis that the loop normalises last.
        one_pass: whether a single half-step follows.
        row_mass: (1,) or (N,), what rows are normalised to; None for 1.
        column_mass: (1,) or (M,), what columns are normalised to; None for N / M.

    Returns:
        (B, H, M) for keys, (B, H, N) for queries.
    """
    own_mass = column_mass if side == "keys" else row_mass
    log_mass = torch.zeros((), dtype=scores.dtype) if own_mass is None else own_mass.log()
    before = half_steps - first_half_steps(side, last, one_pass)
    if before == 0:
        return torch.zeros_like(scores[..., 0, :] if side == "keys" else scores[..., 0]) - log_mass
    f, g = scaled_duals(scores, before, "columns" if side == "keys" else "rows", row_mass, column_mass)
    return (g if side == "keys" else f) - log_mass


class SlicedDual(nn.Module):
    """A fitted sliced dual: a fixed-depth replacement of a Sinkhorn loop.

    This describes the dual of the keys; that of the queries is the same with queries and keys exchanged. The first set
    of weights maps features of the keys to an estimate of their dual. Two half-steps from an estimate g, f = rows(g)
    and columns(f), are its *closure*. Each further set combines the features with all closures so far into the next
    estimate, a fitted closure step: an extrapolation with coefficients learned once that aims at the finite teacher,
    where plain extra iterations would drift to the converged plan (docs/method.md). The closure of the last estimate
    gives a plan whose columns were normalised last; where rows come last, one half-step more follows.

    In one pass there is no closure: the estimate is of the keys' dual at the loop's end, and the softmax over the keys
    with that bias is the plan.

    Masses of the kernel's rows and columns that are not 1 multiply the scaling vectors as in the loop. Estimates and
    closures are duals without the logarithm of the columns' masses, which is added wherever such a dual is used.

    All of it works on one kernel, softmax(scores). Where the scores spread too far for float32, the kernel is
    softmax(scores + first estimate): its columns sum nearly to their marginals, so scaling vectors stay near 1 whatever
    the scores, for one more pass over them.
    """

    def __init__(
        self,
        params: SlicedDualParams,
        last: Axis = "rows",
        masked: bool = False,
        row_mass: torch.Tensor | None = None,
        column_mass: torch.Tensor | None = None,
        wide: bool = False,
        lowering: Lowering = "materialised",
    ) -> None:
        """Set up the operator.

        Args:
            params: the fit for this site; the operator takes its dtype.
            last: the axis that the last half-step normalises.
            masked: whether scores below `scaling.MIN_LIVE` are excluded; only without slices.
            row_mass: (1,) or (N,), what rows are normalised to; None for 1.
            column_mass: (1,) or (M,), what columns are normalised to; None for 1. On the axis that is not last a factor
                changes nothing.
            wide: whether the scores spread further than `scaling.MAX_SPREAD`.
            lowering: the form that it takes in a graph, `forward` or `from_points`.
        """
        super().__init__()
        self.last, self.wide, self.lowering = last, wide, lowering
        self.slices, self.steps, self.paired = params.slices, len(params.weights) - 1, params.paired
        self.turned, self.masked = params.side == "queries", masked
        self.first_half_steps = first_half_steps(params.side, last, params.one_pass)
        self.register_buffer("query_basis", params.query_basis)
        self.register_buffer("key_basis", params.key_basis)
        self.register_buffer("knots", params.knots)
        self.register_buffer("row_mass", row_mass)
        self.register_buffer("column_mass", column_mass)
        if params.weights:
            # All sets share one product with the features. Where the kernel holds the first estimate, the others are
            # needed, and closures come, as differences from it.
            features = params.weights[0].shape[-1]
            first = params.weights[0]
            shares = [first]
            for step, weights in enumerate(params.weights[1:], start=1):
                of_closures = weights[:, features:]
                of_first = (of_closures.sum(dim=-1, keepdim=True) - 1) * first if wide else 0
                shares.append(weights[:, :features] + of_first)
                self.register_buffer(f"closure_weights_{step}", of_closures.unsqueeze(-2))  # H 1 step
            of_all, coordinates = torch.stack(shares, dim=-2), params.query_basis.shape[-1]  # H sets F
            sizes = [params.slices + coordinates + 1, 2 * pairs_of(coordinates).shape[-1] * params.paired]
            of_first, of_pairs, of_hinges = of_all.tensor_split((sizes[0], sum(sizes)), dim=-1)
            self.register_buffer("feature_weights", torch.cat([of_first, of_hinges], dim=-1))
            self.register_buffer("pair_weights", pair_matrices(of_pairs, coordinates) if params.paired else None)

    query_basis: torch.Tensor
    key_basis: torch.Tensor
    knots: torch.Tensor
    row_mass: torch.Tensor | None
    column_mass: torch.Tensor | None
    feature_weights: torch.Tensor
    pair_weights: torch.Tensor | None

    @property
    def coefficients(self) -> list[str]:
        """Names of the buffers with what was fitted to the dual, on the fixed bases and knots."""
        names = ("feature_weights", "pair_weights", *(f"closure_weights_{step}" for step in range(1, self.steps + 1)))
        return [name for name in names if getattr(self, name, None) is not None]

    @property
    def half_steps(self) -> int:
        """Number of half-steps over the scores."""
        return self.first_half_steps + 2 * self.steps

    def masses(self, kernel: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the masses of the kernel's rows (1, rows) and columns (1, columns); None for 1."""
        masses = self.row_mass, self.column_mass
        rows, columns = (
            None if mass is None else mass.expand(size).unsqueeze(0)
            for mass, size in zip(masses[:: -1 if self.turned else 1], kernel.shape[-2:], strict=True)
        )
        return rows, columns

    def coordinates(self, queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the coordinates of own and other points, as `features.py` calls them."""
        of_keys, of_queries = project(keys, self.key_basis), project(queries, self.query_basis)
        return (of_queries, of_keys) if self.turned else (of_keys, of_queries)

    def estimates(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        live_own: torch.Tensor | None = None,
        live_other: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Multiply each set of weights with the features: (B, H, sets, M)."""
        points = self.coordinates(queries, keys)
        weights = self.feature_weights, self.pair_weights
        return estimate(*points, self.slices, self.knots, *weights, live_own, live_other)

    def scale_columns(
        self, scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, fused: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """Take all steps up to the last on columns, from scores as in `oriented`; N and M are the kernel's axes.

        Returns:
            The kernel (B, H, N, M); the scaling vectors (B, H, 1, N) of its rows, None for 1, and (B, H, 1, M) of its
            columns; the dual (B, H, 1, M) that the kernel holds, None for 0; and the differences of the closures of all
            estimates from it, 0 where masked.
        """
        live_rows, live_columns = live_mask(scores) if self.masked else (None, None)
        estimates = self.estimates(queries, keys, live_columns, live_rows)
        first = estimates[..., :1, :]
        row_mass, column_mass = self.masses(scores)
        in_kernel = first if self.wide else None
        kernel, u = start(scores if in_kernel is None else scores + in_kernel, self.masked, fused)
        if in_kernel is None:
            u = row_scaling(kernel, times(scaling_vector(first, live_columns), column_mass))
        elif column_mass is not None:
            u = row_scaling(kernel, column_mass)
        u = times(u, row_mass)
        v = column_scaling(kernel, u)
        closures = [log_where_live(v, live_columns)]
        for step in range(1, self.steps + 1):
            weights: torch.Tensor = getattr(self, f"closure_weights_{step}")
            dual = estimates[..., step : step + 1, :] + weights @ torch.cat(closures, dim=-2)
            u = times(row_scaling(kernel, times(scaling_vector(dual, live_columns), column_mass)), row_mass)
            v = column_scaling(kernel, u)
            closures.append(log_where_live(v, live_columns))
        v = v if column_mass is None else v * column_mass
        return kernel, u, v, in_kernel, closures

    def vectors(self, scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return what a next set of weights may combine: features and closures so far, (B, H, F + sets, M).

        For the queries' dual, N replaces M.
        """
        scores = scores.transpose(-1, -2) if self.turned else scores
        live_rows, live_columns = live_mask(scores) if self.masked else (None, None)
        points = self.coordinates(queries, keys)
        features = dual_features(*points, self.slices, self.knots, self.paired, live_columns, live_rows)
        if self.steps < 0:
            return features
        *_, in_kernel, closures = self.scale_columns(scores, queries, keys, fused=True)
        return torch.cat([features, *(c if in_kernel is None else in_kernel + c for c in closures)], dim=-2)

    def forward(
        self, scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return plan @ values (B, H, N, E), or without values the plan (B, H, N, M).

        Args:
            scores: (B, H, N, M), in units of the temperature.
            queries: (B, H, N, D).
            keys: (B, H, M, D).
            values: (B, H, M, E).
        """
        if self.turned:
            return self.oriented(scores.transpose(-1, -2), queries, keys, values, fused=False)
        return self.oriented(scores, queries, keys, values)

    def oriented(
        self,
        scores: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        fused: bool = True,
    ) -> torch.Tensor:
        """Compute what `forward` does, with scores (B, H, M, N) where the operator is `turned`; see `scaling.start`."""
        v: torch.Tensor | None = None
        row_mass, column_mass = self.masses(scores)
        if self.first_half_steps == 1:
            live_rows, live_columns = live_mask(scores) if self.masked else (None, None)
            bias = with_log(self.estimates(queries, keys, live_columns, live_rows), column_mass)
            kernel, u = start(scores + bias, self.masked, fused)
            u = times(u, row_mass)
        else:
            kernel, u, v, _, _ = self.scale_columns(scores, queries, keys, fused)
        if self.first_half_steps == 3:
            u = times(row_scaling(kernel, v), row_mass)
        return scaled_plan(kernel, u, v, values, self.turned)

    def from_points(
        self,
        scaled: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        live: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return plan @ values (B, H, N, E) in fused passes (`fused.py`), for an operator that ends on rows.

        Args:
            scaled: (B, H, N, D), queries whose products with the keys are scores in units of the temperature.
            queries: (B, H, N, D), as the bases are for.
            keys: (B, H, M, D).
            values: (B, H, M, E).
            live: (B, H, 1, M), 1 for a key that takes part and 0 for one that is masked; None for 1.
        """
        own, other = (scaled, keys) if self.turned else (keys, scaled)
        live_own, live_other = (None, live) if self.turned else (live, None)
        estimates = self.estimates(queries, keys, live_own, live_other)
        if self.first_half_steps == 1:
            return attend(scaled, keys, with_log(estimates, self.column_mass), values, live, self.row_mass)
        masses = self.row_mass, self.column_mass
        other_mass, own_mass = masses[:: -1 if self.turned else 1]
        dual = half_step(other, own, with_log(estimates[..., :1, :], own_mass), live_own, other_mass)
        closures: list[torch.Tensor] = []
        for step in range(1, self.steps + 1):
            closures.append(half_step(own, other, dual, live_other))
            weights: torch.Tensor = getattr(self, f"closure_weights_{step}")
            combined = estimates[..., step : step + 1, :] + weights @ torch.cat(closures, dim=-2)
            dual = half_step(other, own, with_log(combined, own_mass), live_own, other_mass)
        if self.first_half_steps == 3:
            dual = half_step(own, other, dual, live_other, own_mass)
        return attend(scaled, keys, dual, values, live, self.row_mass)


def with_log(dual: torch.Tensor, mass: torch.Tensor | None) -> torch.Tensor:
    """Add the logarithm of a mass (1,) or (M,), None for 1, to a dual (B, H, 1, M)."""
    return dual if mass is None else dual + mass.log()


def scaling_vector(dual: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Return the scaling vector of a dual (B, H, 1, M), up to a factor: its exp, whose live entries sum to 1."""
    dual = dual if live is None else dual + (1 - live) * MIN_LIVE
    return torch.softmax(dual, dim=-1).clamp_min(math.exp(-MAX_LOG))


def log_where_live(v: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Return the logarithm of a scaling vector of the columns, 0 where they are masked."""
    return torch.log(v) if live is None else torch.log(v) * live


def sliced_dual_plan_ref(
    scores: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    params: SlicedDualParams,
    last: Axis = "rows",
    row_mass: torch.Tensor | None = None,
    column_mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the float64 reference of `SlicedDual`'s plan: its definition in the log domain, without rescaling."""
    dims: dict[str, int] = {}
    check_shape(dims, scores, "B H N M")
    check_shape(dims, queries, "B H N D")
    check_shape(dims, keys, "B H M D")
    scores = scores.double()
    own = torch.einsum("bhmd,hdl->bhlm", keys.double(), params.key_basis.double())
    other = torch.einsum("bhnd,hdl->bhln", queries.double(), params.query_basis.double())
    ones = torch.ones(1, dtype=torch.float64)
    rows, columns = (ones if mass is None else mass.double() for mass in (row_mass, column_mass))
    if params.side == "queries":
        scores, own, other, rows, columns = scores.transpose(-1, -2), other, own, columns, rows
    vectors = list(dual_features_ref(own, other, params.slices, params.knots, params.paired).unbind(dim=-2))
    f, g = torch.zeros(()), torch.zeros(())
    for weights in params.weights:
        g = torch.einsum("hf,bhfm->bhm", weights.double(), torch.stack(vectors, dim=-2)) + columns.log()
        f = row_step(scores, g, rows)
        if params.one_pass:
            break
        g = column_step(scores, f, columns)
        vectors.append(column_step(scores, f, ones))
    if first_half_steps(params.side, last, params.one_pass) == 3:
        f = row_step(scores, g, rows)
    oriented = plan(scores, f, g)
    return oriented if params.side == "keys" else oriented.transpose(-1, -2)
