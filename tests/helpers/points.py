"""Queries and keys that bases, hinges and maps are fitted to."""

import torch
from helpers.fitted import DIM, HEADS, SCALE, TOKENS


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated_points(seed, tokens=TOKENS):
    """Points (4, H, N, D) whose coordinates depend on each other and differ in spread, off the origin."""
    return normal(seed, 4, HEADS, tokens, DIM) @ normal(seed + 1, HEADS, DIM, DIM) + normal(seed + 2, 4, HEADS, 1, DIM)


def scores_of(queries, keys, scale):
    return torch.einsum("bhnd,bhmd,h->bhnm", queries, keys, scale)


def activations(queries, keys):
    """What a batch of the site's activations holds."""
    return {"attention": (scores_of(queries, keys, SCALE), queries, keys)}
