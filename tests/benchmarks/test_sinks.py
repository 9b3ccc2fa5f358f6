import math

import pytest
import torch
from helpers.documents import tables
from helpers.tolerances import FLOAT64

from benchmarks.study.sinks import draw, effective_rank, section, top_share


def tokens_of(*spectrum: float) -> torch.Tensor:
    """Tokens (1, 2 r, 8) of mean zero with these singular values."""
    half = torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ torch.eye(len(spectrum), 8, dtype=torch.float64)
    return torch.cat([half, -half]).unsqueeze(0) / 2**0.5


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [
        ((2.0,), 1.0),
        ((1.0, 1.0, 1.0, 1.0, 1.0), 5.0),
        ((3.0, 1.0), math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))),
    ],
)
def test_the_effective_rank_is_that_of_the_spectrum(spectrum, rank):
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    shift = torch.randn(8, dtype=torch.float64)
    tokens = tokens_of(*spectrum)
    for same in (tokens, 100 * tokens, tokens @ rotation, tokens + shift):
        assert effective_rank(same).item() == pytest.approx(rank, rel=FLOAT64)


def test_tokens_that_are_all_the_same_have_rank_one_each_sample_on_its_own():
    ranks = effective_rank(torch.cat([torch.ones(1, 6, 8, dtype=torch.float64), tokens_of(1.0, 1.0, 1.0)]))
    assert ranks.tolist() == pytest.approx([1.0, 3.0], rel=FLOAT64)


def test_the_share_of_the_top_key_is_that_of_all_mass():
    uniform, sink = torch.full((1, 2, 6, 4), 0.25), torch.zeros(1, 2, 6, 4)
    sink[..., 3] = 1.0
    mixed = (uniform + sink) / 2
    assert top_share(torch.cat([uniform, sink, mixed])).tolist() == [[0.25] * 2, [1.0] * 2, [0.625] * 2]


def model(share: float, rank: float) -> dict:
    return {"top_share": [share, share], "largest_column": [2 * share] * 2, "rank": [9.0, 8.0, rank]}


def row(task: str, seed: int) -> dict:
    models = {"softmax": model(5.0 + seed, 2.0), "Sinkhorn": model(1.0, 6.0), "one pass": model(1.5, 5.5)}
    models["default"] = model(1.25, 6.0)
    return {"task": task, "seed": seed, "samples": 8, "tokens": 64, "half_steps": 40, "models": models}


ROWS = {f"{task} {seed}": row(task, seed) for task in ("digits", "points") for seed in (0, 1)}


def test_each_task_has_a_table_by_layer_and_depth_and_what_one_pass_keeps():
    lines = list(section(ROWS))
    assert lines[0] == "## What doubly-stochastic attention is for"
    digits, points = tables(lines)
    assert digits == points
    assert digits[0] == ["", "softmax", "Sinkhorn", "one pass", "default"]
    assert len(digits) == 1 + 2 + 2 + 3
    assert digits[1][1:3] == ["5.50 ± 0.71", "1.00 ± 0.00"]
    assert digits[-1][0].endswith("depth 2")
    assert digits[-1][1] == "2.00 ± 0.00"
    assert sum("One pass keeps 89% of the distance" in line for line in lines) == 2


def test_the_figure_is_drawn(tmp_path):
    draw(ROWS, tmp_path)
    assert (tmp_path / "study-sinks.png").stat().st_size > 10_000
