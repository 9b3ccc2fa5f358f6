"""What the dual of a set of points is estimated from: cheap functions of their coordinates.

Each is, up to a constant, the potential of a one-dimensional transport problem along one coordinate of a balanced
basis, exactly or under an assumption, or a piece of which such potentials are made (docs/method.md).
"""

import torch

from asapc.ops.potentials import potentials, potentials_ref
from asapc.ops.scaling import MIN_LIVE

# Below this variance a projected coordinate counts as constant, and its features as zero.
MIN_VARIANCE = 1e-12
# Coordinates, from the first, of which products of two are taken.
PAIRED = 8


def project(points: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Coordinates (B, H, C, N) of points (B, H, N, D) along the columns (H, D, C) of a basis.

    Points come last, here and in all that follows, since what is done to a coordinate is done to all points alike.
    """
    return basis.transpose(-1, -2) @ points.transpose(-1, -2).to(basis.dtype)


def live_mask(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 where a row or column takes part and 0 where it is masked: (B, H, 1, N) and (B, H, 1, M), of scores' dtype."""
    live = scores >= MIN_LIVE
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


def correlation(centred: torch.Tensor, spread: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Correlations (B, H, C, C) of coordinates less their mean (B, H, C, N), of their spreads (B, H, C, 1)."""
    weighted = centred if live is None else centred * live
    count = centred.shape[-1] if live is None else live.sum(dim=-1, keepdim=True).clamp_min(1)
    return weighted @ centred.transpose(-1, -2) / (spread @ spread.transpose(-1, -2) * count)


def pairs_of(coordinates: int) -> torch.Tensor:
    """The pairs (2, P) of different coordinates of which products are taken."""
    count = min(coordinates, PAIRED)
    return torch.triu_indices(count, count, 1)


def pair_matrices(weights: torch.Tensor, coordinates: int) -> torch.Tensor:
    """Weights (H, S, 2 P) of pairs as matrices (H, 2, S, K, K) of what stands at row i and column j for pair i, j."""
    first, second = pairs_of(coordinates)
    count = min(coordinates, PAIRED)
    matrices = weights.new_zeros(weights.shape[0], 2, weights.shape[1], count, count)
    matrices[..., first, second] = torch.unflatten(weights, -1, (2, -1)).transpose(1, 2)
    return matrices


def dual_features(
    x: torch.Tensor,
    y: torch.Tensor,
    slices: int,
    knots: torch.Tensor,
    paired: bool = False,
    live_x: torch.Tensor | None = None,
    live_y: torch.Tensor | None = None,
) -> torch.Tensor:
    """Functions of the points x from which their dual, against the points y, is estimated.

    In the order of the features' axis:

    - `slices` exact potentials of the first coordinates; 0 where there is a mask;
    - `bquad`, one for each coordinate: the potential between two Gaussians in one dimension,
      -(sd(y) / sd(x)) / 2 * (x - mean x)^2, no sort needed;
    - `mean`: -x.mean(y), the term of every dual that the mean of y causes;
    - `pairs` of coordinates i < j: x_i x_j * sqrt(sd(y_i) sd(y_j) / (sd(x_i) sd(x_j))), x less its mean, times the
      sample's correlation of x_i and x_j, and then all of them again times that of y_i and y_j. The potential between
      two Gaussians is a quadratic form in all coordinates; where these are balanced over all samples, and correlated
      in one, this is its first order in the correlations;
    - `hinges` in the first coordinates: sd(y) * relu(x - mean x - knot * sd(x)). What a one-dimensional potential
      differs by from a parabola is convex (Brenier), and sums of hinges are what is convex and piecewise linear.

    Args:
        x: coordinates of the points that the dual belongs to, (B, H, C, N), in a balanced basis.
        y: coordinates of the points on the other side, (B, H, C, M), so that the sum of x * y over C is the score, or
            most of it.
        slices: number of coordinates, from the first, whose exact potential is taken.
        knots: (H, K, P) places of P hinges in each of the first K coordinates, in standard deviations.
        paired: whether there are pairs, of the first PAIRED coordinates.
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
    if paired:
        first, second = pairs_of(x.shape[-2])
        scaled = x * (y_spread / x_spread).sqrt()
        products = scaled[..., first, :] * scaled[..., second, :]
        for points, spread, live in ((x, x_spread, live_x), (y - y_mean, y_spread, live_y)):
            groups.append(products * correlation(points, spread, live)[..., first, second].unsqueeze(-1))
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
    pairs: torch.Tensor | None = None,
    live_x: torch.Tensor | None = None,
    live_y: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights (H, S, F) times the features: (B, H, S, N). The arguments are those of `dual_features`.

    What depends on a sample's moments multiplies the weights, which are few, and not the points. Weights of pairs are
    not among `weights`; they come as `pair_matrices`.
    """
    x, y_mean = x - mean(x, live_x), mean(y, live_y)
    squares = x * x
    x_variance = mean(squares, live_x).clamp_min(MIN_VARIANCE).transpose(-1, -2)  # B H 1 C
    y_centred = y - y_mean
    y_variance = variance(y_centred, live_y).transpose(-1, -2)
    sizes = [slices, x.shape[-2], 1, knots[0].numel()]
    of_slices, of_parabolas, of_mean, of_hinges = torch.split(weights, sizes, dim=-1)
    square = (-0.5 * of_parabolas) * (y_variance / x_variance).sqrt()
    total = square @ squares + (-of_mean * y_mean.transpose(-1, -2)) @ x
    if pairs is not None:
        count = pairs.shape[-1]
        x_spread, y_spread = (v[..., :count].sqrt().transpose(-1, -2) for v in (x_variance, y_variance))
        of_x, of_y = pairs.unbind(dim=1)  # H S K K
        form = of_x * correlation(x[..., :count, :], x_spread, live_x).unsqueeze(-3)
        form = form + of_y * correlation(y_centred[..., :count, :], y_spread, live_y).unsqueeze(-3)
        ratio = (y_spread / x_spread).sqrt()
        form = form * (ratio @ ratio.transpose(-1, -2)).unsqueeze(-3)
        applied = torch.unflatten(form.flatten(-3, -2) @ x[..., :count, :], -2, (-1, count))  # B H S K N
        total = total + (applied * x[..., :count, :].unsqueeze(-3)).sum(dim=-2)
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


def dual_features_ref(
    x: torch.Tensor, y: torch.Tensor, slices: int, knots: torch.Tensor, paired: bool = False
) -> torch.Tensor:
    """Float64 reference of `dual_features`, function by function: (B, H, F, N)."""
    x, y = x.double(), y.double()
    from_x, from_y = (list((c - c.mean(dim=-1, keepdim=True)).unbind(dim=-2)) for c in (x, y))  # deviations
    sd_x, sd_y = (
        [d.square().mean(dim=-1, keepdim=True).clamp_min(MIN_VARIANCE).sqrt() for d in of_each]
        for of_each in (from_x, from_y)
    )
    quadratic, hinged, pairs = [], [], []
    for i, deviation in enumerate(from_x):
        quadratic.append(-0.5 * sd_y[i] / sd_x[i] * deviation**2)
        if i < knots.shape[-2]:
            for knot in knots[:, i].double().unbind(dim=-1):
                hinged.append(sd_y[i] * (deviation - knot[:, None] * sd_x[i]).clamp_min(0))
    for deviations, sd in ((from_x, sd_x), (from_y, sd_y)) if paired else ():
        for i, j in pairs_of(x.shape[-2]).T.tolist():
            correlated = (deviations[i] * deviations[j]).mean(dim=-1, keepdim=True) / (sd[i] * sd[j])
            ratio = (sd_y[i] * sd_y[j] / (sd_x[i] * sd_x[j])).sqrt()
            pairs.append(correlated * ratio * from_x[i] * from_x[j])
    sliced = [potentials_ref(x[..., i, :], y[..., i, :]) for i in range(slices)]
    towards_mean = -torch.einsum("bhdn,bhd->bhn", x - x.mean(dim=-1, keepdim=True), y.mean(dim=-1))
    return torch.stack([*sliced, *quadratic, towards_mean, *pairs, *hinged], dim=-2)
