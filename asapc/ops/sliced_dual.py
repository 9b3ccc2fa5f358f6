"""The sliced-dual operator: a plan whose query-side dual is estimated, not iterated.

Queries and keys are projected on a few directions; the exact one-dimensional potentials of the projections
(`potentials.py`) and a few cheap features go through a linear map per head to an estimate of the
query-side dual; the two-sided c-transform (`c_transform.py`) rebuilds the plan. After ASAP,
arXiv 2605.12879; the balanced basis and the quadratic features are asapc's own (docs/method.md).
"""

import torch
from torch import nn

from asapc.artifacts import SlicedDualParams
from asapc.ops.c_transform import closure, plan
from asapc.ops.potentials import potentials, potentials_ref
from asapc.ops.scaling import LOWEST_LIVE, column_scaling, row_normalised_output, row_scaling, scaling_exponent
from asapc.shapes import check_shape

# Below this variance a projected coordinate counts as constant, and its quadratic feature as zero.
MIN_VARIANCE = 1e-12


def project(points: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Coordinates (B, H, D, N) of points (B, H, N, D) in a basis (H, D, D) whose columns are directions."""
    return (points @ basis).transpose(-1, -2)


def live_mask(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 where a query or key takes part and 0 where it is masked: (B, H, 1, N) and (B, H, 1, M), of scores' dtype."""
    live = scores >= LOWEST_LIVE
    rows = live.any(dim=-1, keepdim=True).transpose(-1, -2)
    return rows.to(scores.dtype), live.any(dim=-2, keepdim=True).to(scores.dtype)


def mean(values: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Mean over the last axis, of what is live."""
    if live is None:
        return values.mean(dim=-1, keepdim=True)
    return (values * live).sum(dim=-1, keepdim=True) / live.sum(dim=-1, keepdim=True).clamp_min(1)


def dual_features(
    x: torch.Tensor,
    y: torch.Tensor,
    slices: int,
    live_queries: torch.Tensor | None = None,
    live_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """Vectors over the queries from which the query-side dual is estimated.

    In the order of the feature axis:

    - `slices` exact potentials of the first coordinates;
    - `bquad`, one for each coordinate: the potential between two Gaussians in one dimension,
      -(sd(y) / sd(x)) / 2 * (x - mean x)^2, no sort needed;
    - `qmean`: -q.mean(k) * scale, the term of every dual that the keys' mean causes.

    Args:
        x: query coordinates, (B, H, D, N), in a balanced basis.
        y: key coordinates, (B, H, D, M), so that the sum of x * y over D is the score.
        slices: number of coordinates, from the first, whose exact potential is taken; 0 where there is a mask.
        live_queries: see `live_mask`; None where nothing is masked.
        live_keys: the same.

    Returns:
        (B, H, slices + D + 1, N), in units of the scores, each determined up to a constant over N.
    """
    x = x - mean(x, live_queries)
    y_mean = mean(y, live_keys)
    x_variance = mean(x * x, live_queries)
    y_variance = mean((y - y_mean) * (y - y_mean), live_keys)
    ratio = torch.sqrt(y_variance / x_variance.clamp_min(MIN_VARIANCE))
    bquad = -0.5 * ratio * x * x
    qmean = -(x * y_mean).sum(dim=-2, keepdim=True)
    sliced = [potentials(x[..., :slices, :], y[..., :slices, :])] if slices else []
    vectors = torch.cat([*sliced, bquad, qmean], dim=-2)
    return vectors if live_queries is None else vectors * live_queries


def dual_features_ref(x: torch.Tensor, y: torch.Tensor, slices: int) -> torch.Tensor:
    """Float64 reference of `dual_features`, coordinate by coordinate."""
    x, y = x.double(), y.double()
    sliced = [potentials_ref(x[..., i, :], y[..., i, :]) for i in range(slices)]
    quadratic = []
    for i in range(x.shape[-2]):
        deviation = x[..., i, :] - x[..., i, :].mean(dim=-1, keepdim=True)
        spread_x = deviation.square().mean(dim=-1, keepdim=True).clamp_min(MIN_VARIANCE).sqrt()
        spread_y = y[..., i, :].std(dim=-1, keepdim=True, correction=0)
        quadratic.append(-0.5 * spread_y / spread_x * deviation**2)
    key_mean = y.mean(dim=-1)
    qmean = -torch.einsum("bhdn,bhd->bhn", x - x.mean(dim=-1, keepdim=True), key_mean)
    return torch.stack([*sliced, *quadratic, qmean], dim=-2)


class SlicedDual(nn.Module):
    """A fitted sliced dual: a fixed-depth stand-in for a Sinkhorn loop that ends on rows.

    Starting from the features as vectors over the queries, each set of weights but the last combines the
    vectors to a dual, closes it (`closure`), and adds the result to the vectors; the last set gives the
    dual that the plan is rebuilt from. With a single set that is ASAP's operator; more are fitted
    closure steps, asapc's own: an extrapolation with coefficients learned once that aims at the finite
    teacher, where plain extra iterations would drift to the converged plan (docs/method.md).

    The first estimate is added to the scores before the one exp (`scaling.py`), which keeps the kernel near
    the plan itself and hence well within float32, and all that follows are matrix-vector products.
    """

    def __init__(self, params: SlicedDualParams, masked: bool = False) -> None:
        """Set up the operator.

        Args:
            params: what the fit found for this site; the operator takes its dtype.
            masked: whether scores below `scaling.LOWEST_LIVE` are left out; only without slices.
        """
        super().__init__()
        self.slices, self.steps, self.masked = params.slices, len(params.weights), masked
        self.register_buffer("query_basis", params.query_basis)
        self.register_buffer("key_basis", params.key_basis)
        for step, weights in enumerate(params.weights):
            self.register_buffer(f"weights_{step}", weights.unsqueeze(-2))  # H 1 F+step

    query_basis: torch.Tensor
    key_basis: torch.Tensor

    def combine(self, step: int, vectors: torch.Tensor) -> torch.Tensor:
        """Combine vectors (B, H, F + step, N) to the dual (B, H, 1, N) of a step."""
        weights: torch.Tensor = getattr(self, f"weights_{step}")
        return weights @ vectors

    def features(self, scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Vectors (B, H, F, N) that everything starts from."""
        x, y = project(queries, self.query_basis), project(keys, self.key_basis)
        live = live_mask(scores) if self.masked else (None, None)
        return dual_features(x, y, self.slices, *live)

    def scale_columns(
        self, scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Go through all steps up to the column step of the last dual.

        Returns:
            The vectors (B, H, F + steps - 1, N); the dual (B, H, 1, N) that a query-side scaling vector of 1
            stands for; the kernel (B, H, N, M); the key-side scaling vector (B, H, 1, M).
        """
        vectors = self.features(scores, queries, keys)
        dual = self.combine(0, vectors)
        exponent, shift = scaling_exponent(scores + dual.transpose(-1, -2), self.masked)
        kernel = torch.exp(exponent)
        origin = dual - shift
        v = column_scaling(kernel, torch.exp(shift))
        for step in range(1, self.steps):
            vectors = torch.cat([vectors, self.close(scores, origin, kernel, v)], dim=-2)
            relative = self.combine(step, vectors) - origin
            v = column_scaling(kernel, torch.exp(relative - relative.amax(dim=-1, keepdim=True)))
        return vectors, origin, kernel, v

    def close(self, scores: torch.Tensor, origin: torch.Tensor, kernel: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Dual (B, H, 1, N) of the row step after a key-side scaling vector; 0 for masked queries."""
        closed = origin + torch.log(row_scaling(kernel, v))
        return closed * live_mask(scores)[0] if self.masked else closed

    def vectors(self, scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """All vectors (B, H, F + steps, N), the closure of the last dual among them: what a next step may use."""
        if self.steps == 0:
            return self.features(scores, queries, keys)
        vectors, origin, kernel, v = self.scale_columns(scores, queries, keys)
        return torch.cat([vectors, self.close(scores, origin, kernel, v)], dim=-2)

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
        _, _, kernel, v = self.scale_columns(scores, queries, keys)
        if values is None:
            return row_scaling(kernel, v).transpose(-1, -2) * kernel * v
        return row_normalised_output(kernel, v, values)


def sliced_dual_plan_ref(
    scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, params: SlicedDualParams
) -> torch.Tensor:
    """Float64 reference of `SlicedDual`'s plan: its definition in the log domain, nothing rescaled."""
    dims: dict[str, int] = {}
    check_shape(dims, scores, "B H N M")
    check_shape(dims, queries, "B H N D")
    check_shape(dims, keys, "B H M D")
    scores = scores.double()
    x = torch.einsum("bhnd,hdl->bhln", queries.double(), params.query_basis.double())
    y = torch.einsum("bhmd,hdl->bhlm", keys.double(), params.key_basis.double())
    vectors = list(dual_features_ref(x, y, params.slices).unbind(dim=-2))
    f = g = torch.zeros(())
    for weights in params.weights:
        estimate = torch.einsum("hf,bhfn->bhn", weights.double(), torch.stack(vectors, dim=-2))
        f, g = closure(scores, estimate)
        vectors.append(f)
    return plan(scores, f, g)
