"""Marginals of their own."""

import torch


def masses_of(scores, seed):
    """Masses of rows and of columns, by the operators' arguments: none, one for all, or one for each, in one dtype."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(0, 1, size)[seed // 3**i % 3] for i, size in enumerate(scores.shape[-2:])]
    drawn = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.2 for size in sizes)
    rows, columns = (mass.to(scores.dtype) if mass.numel() else None for mass in drawn)
    return {"row_mass": rows, "column_mass": columns}


def of_first(masses, n, m):
    """The masses of the first rows and columns."""
    rows, columns = masses.values()
    return {
        "row_mass": None if rows is None else rows[:n],
        "column_mass": None if columns is None else columns[:m],
    }
