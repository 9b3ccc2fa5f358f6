"""Errors in the user's own forward are said with their line."""

import pytest
import torch
from helpers.stopping import captured, lines_with, scores
from torch import nn

from asapc.errors import CaptureError, SamplesError
from asapc.types.samples import Samples


class Fails(nn.Module):
    def forward(self, x):
        if x.shape[1] == 5:
            raise ValueError("five is too few")
        return x


class Misfits(nn.Module):
    """Fails inside torch, called from here."""

    def forward(self, x):
        return nn.functional.linear(x, torch.zeros(3, 7))


class Exits(nn.Module):
    def forward(self, x):
        raise SystemExit(3)


class Selects(nn.Module):
    """Runs, and cannot be captured: torch would print all of its graph."""

    def forward(self, x):
        print("seen")  # noqa: T201
        return x[x[:, 0, 0] > -99].logsumexp(-1)


class Counts(nn.Module):
    """Runs, and cannot be captured."""

    def forward(self, x):
        return x[: int((x > 0).sum())].sum(0)


@pytest.mark.parametrize(
    ("kind", "error", "line"),
    [
        (Fails, SamplesError, 'raise ValueError("five'),
        (Misfits, SamplesError, "zeros(3, 7)"),
        (Exits, SamplesError, "raise SystemExit(3)"),
        (Counts, CaptureError, "int((x > 0)"),
        (Selects, CaptureError, "x[x[:, 0, 0] > -99]"),
    ],
)
def test_the_line_is_that_of_the_forward(kind, error, line, capfd):
    with pytest.raises(error) as caught:
        captured(kind(), scores())
    assert lines_with(line, __file__)[0] in str(caught.value)
    printed = capfd.readouterr()
    assert printed.out in ("", "seen\n")  # when it ran, and not when it was traced
    assert printed.err == ""


def test_a_model_on_a_gpu_or_of_another_type_than_its_samples_is_told_so():
    class OnGpu(nn.Module):
        def forward(self, x):
            return x.cuda()

    with pytest.raises(SamplesError) as caught:
        captured(OnGpu(), scores())
    assert "x.device" in caught.value.hint
    for dtype in ("bfloat16", "float16", "float64"):
        with pytest.raises(SamplesError) as caught:
            captured(nn.Linear(5, 5, dtype=getattr(torch, dtype)), Samples({"input": scores().inputs["x"]}))
        assert f"the weights are {dtype}" in caught.value.hint
