"""Errors in the user's own forward are said with their line."""

import pytest
import torch
from helpers.stopping import captured, lines_with, scores
from torch import nn

from asapc.errors import CaptureError, SamplesError


class Fails(nn.Module):
    def forward(self, x):
        if x.shape[1] == 5:
            raise ValueError("five is too few")
        return x


class Misfits(nn.Module):
    """Fails inside torch, called from here."""

    def forward(self, x):
        return nn.functional.linear(x, torch.zeros(3, 7))


class Counts(nn.Module):
    """Runs, and cannot be captured."""

    def forward(self, x):
        return x[: int((x > 0).sum())].sum(0)


@pytest.mark.parametrize(
    ("kind", "error", "line"),
    [
        (Fails, SamplesError, 'raise ValueError("five'),
        (Misfits, SamplesError, "zeros(3, 7)"),
        (Counts, CaptureError, "int((x > 0)"),
    ],
)
def test_the_line_is_that_of_the_forward(kind, error, line):
    with pytest.raises(error) as caught:
        captured(kind(), scores())
    assert lines_with(line, __file__)[0] in str(caught.value)
