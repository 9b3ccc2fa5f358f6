"""Random numbers in evaluation are refused where they change the outputs, with the line that draws them."""

import linecache

import pytest
import torch
import torch.nn.functional as F
from helpers.stopping import captured
from torch import nn

from asapc.errors import CaptureError


class Draws(nn.Module):
    """Fused attention, which draws nothing here, and what some function does to the result."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        x = F.scaled_dot_product_attention(x, x, x)
        return self.draw(x)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.1),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
        lambda x: x + 0.1 * torch.randn_like(x),
        lambda x: x[:, torch.randperm(5)],
    ],
    ids=["dropout", "attention", "noise", "order"],
)
def test_random_numbers_that_change_the_outputs_are_refused_with_their_line(draw):
    with pytest.raises(CaptureError, match="random numbers change the outputs") as caught:
        captured(Draws(draw))
    places = str(caught.value).partition("drawn at ")[2].split(", ")
    [text] = [linecache.getline(__file__, int(place.rpartition(":")[2])) for place in places]
    assert "self.draw" in text
    assert "training=self.training" in caught.value.hint


def choose(limit, yes, no):
    return lambda x: torch.cond(x.sum() > limit, yes, no, (x,))


def noisy(x):
    return x + 0.1 * torch.randn_like(x)


def dropping(x):
    return F.dropout(x, 0.1)


@pytest.mark.parametrize("draw", [noisy, dropping])
@pytest.mark.parametrize("limit", [-1e9, 1e9])
@pytest.mark.parametrize("swapped", [False, True])
def test_random_numbers_in_branches_are_refused_whichever_the_example_takes(draw, limit, swapped):
    branches = (torch.exp, draw) if swapped else (draw, torch.exp)
    with pytest.raises(CaptureError, match="random numbers change the outputs") as caught:
        captured(Draws(choose(limit, *branches)))
    assert caught.value.hint
    [place] = str(caught.value).partition("drawn at ")[2].split(", ")
    assert "self.draw" in linecache.getline(__file__, int(place.rpartition(":")[2]))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x * 2,
        lambda x: x + 1e-9 * torch.randn_like(x),
        lambda x: F.scaled_dot_product_attention(x, x, x),
    ],
)
def test_branches_that_draw_nothing_that_shows_are_accepted(draw):
    assert captured(Draws(choose(1e9, draw, torch.exp))).program is not None


@pytest.mark.parametrize(
    "draw", [lambda x: F.dropout(x, 0.1, training=False), lambda x: x + 1e-9 * torch.randn_like(x)]
)
def test_random_numbers_that_change_nothing_are_accepted(draw):
    assert captured(Draws(draw)).program is not None
