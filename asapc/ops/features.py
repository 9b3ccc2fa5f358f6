"""Computes what the dual of a set of points is estimated from: cheap functions of their coordinates.

Each is, up to a constant, the potential of a one-dimensional transport problem along one coordinate of a balanced
basis, exactly or under an assumption, or a part of such potentials (docs/method.md).

The points whose dual it is are `own`, those on the other side `other`: keys and queries where it is the keys' dual,
queries and keys where it is the queries'. Both are coordinates, (B, H, C, N) and (B, H, C, M), in a balanced basis, so
that the sum of own * other over C is the score, or most of it.
"""

import torch

from asapc.ops.potentials import potentials, potentials_ref
from asapc.ops.scaling import MIN_LIVE

# Below this variance a projected coordinate counts as constant, and its features as zero.
MIN_VARIANCE = 1e-12
PAIRED = 8  # coordinates, from the first, whose products of two are features


def project(points: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return the coordinates (B, H, C, N) of points (B, H, N, D) along the columns (H, D, C) of a basis.

    Points come last, here and in all that follows, since every operation on a coordinate treats all points alike.
    """
    return basis.transpose(-1, -2) @ points.transpose(-1, -2).to(basis.dtype)


def live_mask(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1 for each live row (B, H, 1, N) and column (B, H, 1, M), 0 where masked, in the scores' dtype."""
    live = scores >= MIN_LIVE
    rows = live.any(dim=-1, keepdim=True).transpose(-1, -2)
    return rows.to(scores.dtype), live.any(dim=-2, keepdim=True).to(scores.dtype)


def mean(values: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Average over the last axis what is live."""
    if live is None:
        return values.mean(dim=-1, keepdim=True)
    return (values * live).sum(dim=-1, keepdim=True) / live.sum(dim=-1, keepdim=True).clamp_min(1)


def variance(centred: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Return the variance over the last axis of centred values that are live, never zero."""
    return mean(centred * centred, live).clamp_min(MIN_VARIANCE)


def correlation(centred: torch.Tensor, spread: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Return the correlations (B, H, C, C) of centred coordinates (B, H, C, N) with spreads (B, H, C, 1)."""
    weighted = centred if live is None else centred * live
    count = centred.shape[-1] if live is None else live.sum(dim=-1, keepdim=True).clamp_min(1)
    return weighted @ centred.transpose(-1, -2) / (spread @ spread.transpose(-1, -2) * count)


def pairs_of(coordinates: int) -> torch.Tensor:
    """Return the pairs (2, P) of different coordinates that are multiplied."""
    count = min(coordinates, PAIRED)
    return torch.triu_indices(count, count, 1)


def pair_matrices(weights: torch.Tensor, coordinates: int) -> torch.Tensor:
    """Arrange weights (H, S, 2 P) of pairs in matrices (H, 2, S, K, K): that of pair i, j at row i and column j."""
    first, second = pairs_of(coordinates)
    count = min(coordinates, PAIRED)
    matrices = weights.new_zeros(weights.shape[0], 2, weights.shape[1], count, count)
    matrices[..., first, second] = torch.unflatten(weights, -1, (2, -1)).transpose(1, 2)
    return matrices


def dual_features(
    own: torch.Tensor,
    other: torch.Tensor,
    slices: int,
    knots: torch.Tensor,
    paired: bool = False,
    live_own: torch.Tensor | None = None,
    live_other: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the functions of `own` from which its dual, against `other`, is estimated.

    In the order of the features' axis, with sd for the standard deviation:

    - `slices` exact potentials of the first coordinates; 0 where there is a mask;
    - `parabolas`, one for each coordinate: the potential between two Gaussians in one dimension,
      -(sd(other) / sd(own)) / 2 * (own - mean own)^2, no sort needed;
    - `mean`: -own.mean(other), the term of every dual that the mean of `other` causes;
    - `pairs` of coordinates i < j: own_i own_j * sqrt(sd(other_i) sd(other_j) / (sd(own_i) sd(own_j))), own less its
      mean, times the sample's correlation of own_i and own_j, and then all of them again times that of other_i and
      other_j. The potential between two Gaussians is a quadratic form in all coordinates; where these are balanced over
      all samples, and correlated in one, this is its first order in the correlations;
    - `hinges` in the first coordinates: sd(other) * relu(own - mean own - knot * sd(own)). A one-dimensional potential
      differs from a parabola by a convex function (Brenier), and sums of hinges are the functions that are convex and
      piecewise linear.

    Args:
        own: (B, H, C, N).
        other: (B, H, C, M).
        slices: number of coordinates, from the first, whose exact potential is taken.
        knots: (H, K, P) places of P hinges in each of the first K coordinates, in standard deviations.
        paired: whether there are pairs, of the first PAIRED coordinates.
        live_own: (B, H, 1, N), see `live_mask`; None where nothing is masked.
        live_other: (B, H, 1, M), likewise.

    Returns:
        (B, H, F, N), in units of the scores, each function determined up to a constant over N.
    """
    own, other_mean = own - mean(own, live_own), mean(other, live_other)
    own_spread, other_spread = variance(own, live_own).sqrt(), variance(other - other_mean, live_other).sqrt()
    parabolas = -0.5 * (other_spread / own_spread) * own * own
    towards_mean = -(own * other_mean).sum(dim=-2, keepdim=True)
    groups = [*sorted_potentials(own, other, slices), parabolas, towards_mean]
    if paired:
        first, second = pairs_of(own.shape[-2])
        scaled = own * (other_spread / own_spread).sqrt()
        products = scaled[..., first, :] * scaled[..., second, :]
        sides = (own, own_spread, live_own), (other - other_mean, other_spread, live_other)
        for centred, spread, live in sides:
            groups.append(products * correlation(centred, spread, live)[..., first, second].unsqueeze(-1))
    if knots.numel():
        scales = other_spread[..., : knots.shape[-2], :].repeat_interleave(knots.shape[-1], dim=-2)
        groups.append(scales * hinges(own, own_spread, knots))
    features = torch.cat(groups, dim=-2)
    return features if live_own is None else features * live_own


def estimate(
    own: torch.Tensor,
    other: torch.Tensor,
    slices: int,
    knots: torch.Tensor,
    weights: torch.Tensor,
    pairs: torch.Tensor | None = None,
    live_own: torch.Tensor | None = None,
    live_other: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply weights (H, S, F) with the features: (B, H, S, N). The arguments are those of `dual_features`.

    Factors that depend on a sample's moments multiply the weights, which are few, and not the points. Weights of pairs
    are not among `weights`; they come as `pair_matrices`.
    """
    own, other_mean = own - mean(own, live_own), mean(other, live_other)
    squares = own * own
    own_variance = mean(squares, live_own).clamp_min(MIN_VARIANCE).transpose(-1, -2)  # B H 1 C
    other_centred = other - other_mean
    other_variance = variance(other_centred, live_other).transpose(-1, -2)
    sizes = [slices, own.shape[-2], 1, knots[0].numel()]
    of_slices, of_parabolas, of_mean, of_hinges = torch.split(weights, sizes, dim=-1)
    square = (-0.5 * of_parabolas) * (other_variance / own_variance).sqrt()
    total = square @ squares + (-of_mean * other_mean.transpose(-1, -2)) @ own
    if pairs is not None:
        count = pairs.shape[-1]
        own_spread, other_spread = (v[..., :count].sqrt().transpose(-1, -2) for v in (own_variance, other_variance))
        of_own, of_other = pairs.unbind(dim=1)  # H S K K
        form = of_own * correlation(own[..., :count, :], own_spread, live_own).unsqueeze(-3)
        form = form + of_other * correlation(other_centred[..., :count, :], other_spread, live_other).unsqueeze(-3)
        ratio = (other_spread / own_spread).sqrt()
        form = form * (ratio @ ratio.transpose(-1, -2)).unsqueeze(-3)
        applied = torch.unflatten(form.flatten(-3, -2) @ own[..., :count, :], -2, (-1, count))  # B H S K N
        total = total + (applied * own[..., :count, :].unsqueeze(-3)).sum(dim=-2)
    for potential in sorted_potentials(own, other, slices):
        total = total + of_slices @ potential
    if knots.numel():
        scales = other_variance[..., : knots.shape[-2]].sqrt().repeat_interleave(knots.shape[-1], dim=-1)
        total = total + (of_hinges * scales) @ hinges(own, own_variance.transpose(-1, -2).sqrt(), knots)
    return total if live_own is None else total * live_own


def sorted_potentials(own: torch.Tensor, other: torch.Tensor, slices: int) -> list[torch.Tensor]:
    """Return the exact potentials (B, H, slices, N) of the first coordinates in a list, empty without slices."""
    return [potentials(own[..., :slices, :], other[..., :slices, :])] if slices else []


def hinges(centred: torch.Tensor, spread: torch.Tensor, knots: torch.Tensor) -> torch.Tensor:
    """Return hinges (B, H, K * P, N) of centred points (B, H, C, N), at knots (H, K, P) of spreads (B, H, C, 1)."""
    count = knots.shape[-2]
    places = knots.unsqueeze(-1) * spread[..., :count, :].unsqueeze(-2)  # B H K P 1
    return torch.relu(centred[..., :count, :].unsqueeze(-2) - places).flatten(-3, -2)


def dual_features_ref(
    own: torch.Tensor, other: torch.Tensor, slices: int, knots: torch.Tensor, paired: bool = False
) -> torch.Tensor:
    """Compute the float64 reference of `dual_features`, function by function: (B, H, F, N)."""
    own, other = own.double(), other.double()
    from_own, from_other = (list((c - c.mean(dim=-1, keepdim=True)).unbind(dim=-2)) for c in (own, other))  # deviations
    sd_own, sd_other = (
        [d.square().mean(dim=-1, keepdim=True).clamp_min(MIN_VARIANCE).sqrt() for d in deviations]
        for deviations in (from_own, from_other)
    )
    quadratic, hinged, pairs = [], [], []
    for i, deviation in enumerate(from_own):
        quadratic.append(-0.5 * sd_other[i] / sd_own[i] * deviation**2)
        if i < knots.shape[-2]:
            for knot in knots[:, i].double().unbind(dim=-1):
                hinged.append(sd_other[i] * (deviation - knot[:, None] * sd_own[i]).clamp_min(0))
    for deviations, sd in ((from_own, sd_own), (from_other, sd_other)) if paired else ():
        for i, j in pairs_of(own.shape[-2]).T.tolist():
            correlated = (deviations[i] * deviations[j]).mean(dim=-1, keepdim=True) / (sd[i] * sd[j])
            ratio = (sd_other[i] * sd_other[j] / (sd_own[i] * sd_own[j])).sqrt()
            pairs.append(correlated * ratio * from_own[i] * from_own[j])
    sliced = [potentials_ref(own[..., i, :], other[..., i, :]) for i in range(slices)]
    towards_mean = -torch.einsum("bhdn,bhd->bhn", own - own.mean(dim=-1, keepdim=True), other.mean(dim=-1))
    return torch.stack([*sliced, *quadratic, towards_mean, *pairs, *hinged], dim=-2)
