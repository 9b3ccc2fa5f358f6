"""Exact one-dimensional Kantorovich potentials of projected points, by sorting.

The potential is that of the points `own`; `other` are those across. In one dimension the optimal plan for the cost
-own * other pairs sorted points with sorted points, so its dual follows in closed form: along the sorted order the
potential's slope is the point that the own one is paired with. The sign is that of scores, not of costs: the potential
f belongs to the plan exp(own_i other_j / t + f_i / t + g_j / t) as t goes to 0, with f_i = -max_j(own_i other_j + g_j).
"""

import torch


def paired_keys(queries: int, keys: int) -> tuple[list[int], list[int]]:
    """Return the ranks of the two keys whose mean is the slope of the potential between sorted queries i and i + 1.

    Between queries i and i + 1 (of N, counted from 1) the key quantile i / N is paired. Where it falls
    between two keys any value between them is optimal, since square uniform problems have no unique
    potential. asapc takes the midpoint, in the fit and at inference.

    Returns:
        Two lists of N - 1 zero-based ranks; equal entries where the quantile falls inside one key.
    """
    lower = [-(-i * keys // queries) - 1 for i in range(1, queries)]
    upper = [i * keys // queries for i in range(1, queries)]
    return lower, upper


def potentials(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the Kantorovich potentials of the own points for the score own * other and uniform marginals.

    Args:
        own: projected points whose potentials they are, (..., N), any order, ties allowed.
        other: projected points across, (..., M).

    Returns:
        (..., N), in units of own * other, each centred to mean zero over N. The cost is O(N log N + M log M), and no
        tensor is larger than the inputs. TopK, CumSum and Scatter suffice, which every target runtime has.
    """
    n, m = own.shape[-1], other.shape[-1]
    # topk, not sort: it is the sort that exports to ONNX. N and M are therefore fixed in the graph.
    own_sorted, order = torch.topk(own, n, dim=-1, sorted=True)
    other_sorted, _ = torch.topk(other, m, dim=-1, sorted=True)
    lower, upper = paired_keys(n, m)
    if n == m:  # neighbours: slices are cheaper than gathers
        slope = (other_sorted[..., :-1] + other_sorted[..., 1:]) / 2
    else:
        slope = (other_sorted[..., lower] + other_sorted[..., upper]) / 2
    steps = -slope * (own_sorted[..., 1:] - own_sorted[..., :-1])
    f_sorted = torch.cat([torch.zeros_like(own[..., :1]), torch.cumsum(steps, dim=-1)], dim=-1)
    f = torch.zeros_like(own).scatter(-1, order, f_sorted)
    return f - f.mean(dim=-1, keepdim=True)


def potentials_ref(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Compute the float64 reference of `potentials`, straight from the definition, one problem and query at a time."""
    out = torch.empty(own.shape, dtype=torch.float64)
    n, m = own.shape[-1], other.shape[-1]
    for f, xs, ys in zip(out.view(-1, n), own.double().reshape(-1, n), other.double().reshape(-1, m), strict=True):
        order = torch.argsort(xs)
        ys = torch.sort(ys).values
        value = 0.0
        f[order[0]] = value
        for i, (lower, upper) in enumerate(zip(*paired_keys(n, m), strict=True)):
            slope = (ys[lower] + ys[upper]).item() / 2
            value -= slope * (xs[order[i + 1]] - xs[order[i]]).item()
            f[order[i + 1]] = value
        f -= f.mean().item()
    return out
