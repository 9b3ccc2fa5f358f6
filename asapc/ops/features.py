"""What the dual of a set of points is estimated from: cheap functions of their coordinates.

Each is, up to a constant, the potential of a one-dimensional transport problem along one coordinate of a balanced
basis, exactly or under an assumption, or a piece of which such potentials are made (docs/method.md).
"""

import torch

from asapc.ops.potentials import potentials, potentials_ref
from asapc.ops.scaling import LOWEST_LIVE

# Below this variance a projected coordinate counts as constant, and its features as zero.
MIN_VARIANCE = 1e-12


def project(points: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Coordinates (B, H, C, N) of points (B, H, N, D) along the columns (H, D, C) of a basis.

    Points come last, here and in all that follows, since what is done to a coordinate is done to all points alike.
    """
    return basis.transpose(-1, -2) @ points.transpose(-1, -2).to(basis.dtype)


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


def variance(centred: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Variance over the last axis of values less their mean, of what is live; never zero."""
    return mean(centred * centred, live).clamp_min(MIN_VARIANCE)


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
        x: coordinates of the points that the dual belongs to, (B, H, C, N), in a balanced basis.
        y: coordinates of the points on the other side, (B, H, C, M), so that the sum of x * y over C is the score, or
            most of it.
        slices: number of coordinates, from the first, whose exact potential is taken.
        knots: (H, K, P) places of P hinges in each of the first K coordinates, in standard deviations.
        live_x: see `live_mask`; None where nothing is masked.
        live_y: the same.

    Returns:
        (B, H, F, N), in units of the scores, each function determined up to a constant over N.
    """
    x, y_mean = x - mean(x, live_x), mean(y, live_y)
    x_spread, y_spread = variance(x, live_x).sqrt(), variance(y - y_mean, live_y).sqrt()
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
    squares = x * x
    x_variance = mean(squares, live_x).clamp_min(MIN_VARIANCE).transpose(-1, -2)  # B H 1 C
    y_variance = variance(y - y_mean, live_y).transpose(-1, -2)
    sizes = [slices, x.shape[-2], 1, knots[0].numel()]
    of_slices, of_parabolas, of_mean, of_hinges = torch.split(weights, sizes, dim=-1)
    square = (-0.5 * of_parabolas) * (y_variance / x_variance).sqrt()
    total = square @ squares + (-of_mean * y_mean.transpose(-1, -2)) @ x
    for sliced in sorted_potentials(x, y, slices):
        total = total + of_slices @ sliced
    if knots.numel():
        scales = y_variance[..., : knots.shape[-2]].sqrt().repeat_interleave(knots.shape[-1], dim=-1)
        total = total + (of_hinges * scales) @ hinges(x, x_variance.transpose(-1, -2).sqrt(), knots)
    return total if live_x is None else total * live_x


def sorted_potentials(x: torch.Tensor, y: torch.Tensor, slices: int) -> list[torch.Tensor]:
    """Exact potentials (B, H, slices, N) of the first coordinates, as a list of one; of none without slices."""
    return [potentials(x[..., :slices, :], y[..., :slices, :])] if slices else []


def hinges(centred: torch.Tensor, x_spread: torch.Tensor, knots: torch.Tensor) -> torch.Tensor:
    """Hinges (B, H, K * P, N) of points less their mean (B, H, C, N), at knots (H, K, P) of spreads (B, H, C, 1)."""
    count = knots.shape[-2]
    places = knots.unsqueeze(-1) * x_spread[..., :count, :].unsqueeze(-2)  # B H K P 1
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
