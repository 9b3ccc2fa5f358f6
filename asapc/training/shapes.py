"""Point sets that are drawn, not read: shapes to tell apart, and pairs of sets to match."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

POINTS = 128  # tokens
STRETCH, TILT, NOISE = 0.3, 0.4, 0.05
TURN, JITTER = 0.2, 0.02  # of the second set of a pair: radians about each axis, and what its points are moved by


def angle(u: Tensor) -> Tensor:
    """Map [0, 1) to a full turn."""
    return 2 * math.pi * u


def around(radius: Tensor, turn: Tensor, height: Tensor) -> Tensor:
    """Return the points from cylinder coordinates."""
    return torch.stack([radius * angle(turn).cos(), radius * angle(turn).sin(), height], dim=-1)


def cube(u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Return the points on the faces of a cube."""
    face = (6 * w).long()
    flat = torch.stack([2 * u - 1, 2 * v - 1, (2 * (face % 2) - 1).float()], dim=-1)
    axes = (torch.arange(3) + (face // 2).unsqueeze(-1)) % 3
    return flat.gather(-1, axes)


def blobs(u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Return two clouds of points."""
    radius = (-2 * (1 - u).log()).sqrt()
    side = (w < 0.5).float()
    third = (2 * w - 1 + side).clamp(1e-3, 1 - 1e-3)  # the rest of w, uniform again
    return around(0.35 * radius, v, 0.35 * math.sqrt(2) * torch.erfinv(2 * third - 1) + 2 * side)


# Three uniform numbers in [0, 1) a point to a point.
Shape = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES: dict[str, Shape] = {
    "sphere": lambda u, v, w: around((1 - (2 * u - 1) ** 2).sqrt(), v, 2 * u - 1),
    "cube": cube,
    "torus": lambda u, v, w: around(1 + 0.4 * angle(u).cos(), v, 0.4 * angle(u).sin()),
    "cylinder": lambda u, v, w: around(torch.ones_like(u), v, 2 * u - 1),
    "cone": lambda u, v, w: around(u.sqrt(), v, 2 * u.sqrt()),
    "helix": lambda u, v, w: around(torch.ones_like(u), 2 * u, 3 * u),
    "planes": lambda u, v, w: torch.stack([2 * u - 1, 2 * v - 1, (w < 0.5).float()], dim=-1),
    "blobs": blobs,
    "ring": lambda u, v, w: around(torch.ones_like(u), v, 0.2 * w),
    "saddle": lambda u, v, w: torch.stack([2 * u - 1, 2 * v - 1, (2 * u - 1) ** 2 - (2 * v - 1) ** 2], dim=-1),
}


def rotations(vectors: Tensor) -> Tensor:
    """Return the rotations (..., 3, 3) about vectors (..., 3), by as many radians as these are long."""
    axes = torch.eye(3).expand(*vectors.shape, 3)
    matrices: Tensor = torch.linalg.matrix_exp(torch.linalg.cross(axes, vectors.unsqueeze(-2).expand_as(axes)))
    return matrices


def turns(count: int, generator: torch.Generator) -> Tensor:
    """Return rotations (count, 3, 3): any turn about the upright axis, then a tilt."""
    spin = angle(torch.rand(count, generator=generator))
    vector = TILT * torch.randn(count, 3, generator=generator) * torch.tensor([1.0, 1.0, 0.0])
    about, tilt = rotations(torch.stack([torch.tensor([0.0, 0.0, 1.0]) * spin.unsqueeze(-1), vector])).unbind()
    return about @ tilt


def point_sets(count: int, seed: int, size: int = POINTS) -> tuple[Tensor, Tensor]:
    """Return sets (count, size, 3) of shapes stretched, turned, blurred and brought to unit size, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    drawn = torch.rand(3, count, size, generator=generator)
    points = torch.empty(count, size, 3)
    for label, shape in enumerate(SHAPES.values()):
        points[labels == label] = shape(*drawn[:, labels == label])
    points = points * (1 + STRETCH * (2 * torch.rand(count, 1, 3, generator=generator) - 1))
    points = points - points.mean(dim=1, keepdim=True)
    points = points @ turns(count, generator)
    points = points / points.square().sum(dim=-1).mean(dim=-1).sqrt().view(-1, 1, 1)
    return points + NOISE * torch.randn(points.shape, generator=generator), labels


def pairs(count: int, seed: int, size: int = POINTS) -> tuple[Tensor, Tensor, Tensor]:
    """Return pairs of sets (count, size, 3), the second the first turned, jittered and shuffled, and where points went.

    Returns:
        Both sets, and for each point of the first its place in the second, (count, size).
    """
    first, _ = point_sets(count, seed, size)
    generator = torch.Generator().manual_seed(seed + 1000)  # not what the sets were drawn by
    turned = first @ rotations(TURN * torch.randn(count, 3, generator=generator))
    turned = turned + JITTER * torch.randn(turned.shape, generator=generator)
    order = torch.rand(count, size, generator=generator).argsort(dim=-1)
    second = turned.gather(1, order.unsqueeze(-1).expand_as(turned))
    return first, second, order.argsort(dim=-1)
