"""Questions about data: those that only end a loop are answered, all others are refused with their line."""

import logging
import warnings
from pathlib import Path

import pytest
import torch
from helpers.stopping import captured
from torch import nn

from asapc.errors import CaptureError


def scaled(x):
    """One iteration in the log domain."""
    x = x - x.logsumexp(-1, keepdim=True)
    return x - x.logsumexp(-2, keepdim=True)


class Plan(nn.Module):
    def forward(self, x):
        for _ in range(3):
            x = scaled(x)
        return x.exp()


class If(Plan):
    def forward(self, x):
        if x.mean() > 0:  # refused: If
            x = x * 3
        return super().forward(x)


class IfInALoop(Plan):
    def forward(self, x):
        for _ in range(3):
            if x.abs().max() > 1:  # refused: IfInALoop
                x = x / 2
        return super().forward(x)


class Ternary(Plan):
    def forward(self, x):
        x = 2 * x if x.max() > 1 else x  # refused: Ternary
        return super().forward(x)


class TernaryThatIsReturned(Plan):
    def forward(self, x):
        return super().forward(x[:, :3] if (x > 0).all() else x)  # refused: TernaryThatIsReturned


class Number(Plan):
    def forward(self, x):
        largest = float(x.abs().max())  # refused: Number
        return super().forward(x / largest)


class Flag(Plan):
    def forward(self, x):
        large = bool(x.max() > 1)  # refused: Flag
        for _ in range(3):
            if large:
                break
            x = x - x.mean()
        return super().forward(x)


class Count(nn.Module):
    def forward(self, x):
        for _ in range(3 if bool(x.sum() > 0) else 5):  # refused: Count
            x = scaled(x)
        return x.exp()


class Entry(Plan):
    def forward(self, x):
        return super().forward((x, 2 * x)[bool(x.sum() > 0)])  # refused: Entry


class LeavesAtOnce(nn.Module):
    """Its question is no test of convergence: as if nothing had converged, it leaves after one iteration."""

    def forward(self, x):
        for _ in range(9):
            x = scaled(x)
            if x.exp().max() > 0.5:  # refused: LeavesAtOnce
                break
        return x.exp()


class WorkBeforeLeaving(nn.Module):
    def forward(self, x):
        for _ in range(9):
            before, x = x, scaled(x)
            if (x - before).abs().max() < 1e-3:  # refused: WorkBeforeLeaving
                x = 2 * x
                break
        return x.exp()


class OneIterationMore(nn.Module):
    """A function of its own asks, and its caller branches."""

    def large(self, x):
        return (x.abs() > 1).any()

    def forward(self, x):
        if self.large(x):  # refused: OneIterationMore
            x = scaled(x)
        return scaled(x).exp()


class Attribute(Plan):
    def forward(self, x):
        self.mean = float(x.mean())  # refused: Attribute
        return super().forward(x)


class Sum(Plan):
    total = 0.0

    def forward(self, x):
        self.total += float(x.abs().max())  # refused: Sum
        return super().forward(x)


REFUSED = [If, IfInALoop, Ternary, TernaryThatIsReturned, Count, Entry]
REFUSED += [LeavesAtOnce, WorkBeforeLeaving, OneIterationMore]


def refusal_of(module) -> CaptureError:
    """With its line."""
    lines = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if text.endswith(f"# refused: {module.__name__}"))
    with pytest.raises(CaptureError) as refusal:
        captured(module())
    assert f"{__file__}:{line}" in str(refusal.value)
    return refusal.value


@pytest.mark.parametrize("module", REFUSED, ids=lambda module: module.__name__)
def test_a_branch_on_data_is_refused_with_its_line(module):
    refusal = refusal_of(module)
    assert "branches on data" in str(refusal)
    assert "torch.where" in refusal.hint


@pytest.mark.parametrize("module", [Number, Flag, Attribute, Sum], ids=lambda module: module.__name__)
def test_a_number_that_is_kept_is_not_called_a_branch(module):
    refusal = refusal_of(module)
    assert "takes a number out of the graph" in str(refusal)
    assert "branches" not in str(refusal)
    assert "tensor" in refusal.hint


class Appends(nn.Module):
    def forward(self, x):
        errors = []
        for _ in range(9):
            before, x = x, scaled(x)
            errors.append(float((x - before).abs().max()))
            if errors[-1] < 1e-9:
                break
        return x.exp()


class Assigns(nn.Module):
    def forward(self, x):
        for i in range(9):
            before, x = x, scaled(x)
            error = float((x - before).abs().max())
            print(f"iteration {i}: {error}")  # noqa: T201
            if i > 3 and error < 1e-9:
                converged = True  # noqa: F841
                break
        return x.exp()


class Guards(Plan):
    def forward(self, x):
        assert not torch.isnan(x).any()
        if torch.isinf(x).any():
            raise ValueError("infinite")
        return super().forward(x)


class Asks(nn.Module):
    """A function of its own asks, and its caller leaves."""

    def converged(self, x, before):
        return bool(((x - before).abs() < 1e-9).all())

    def forward(self, x):
        i = 0
        while True:
            before, x = x, scaled(x)
            i += 1
            if i == 9 or self.converged(x, before):
                return x.exp()


class Checks(Plan):
    """Assertions in the ways of torch, and numbers that only an assertion reads."""

    def forward(self, x):
        torch._assert(x.abs().max() < 1e6, "too large")
        torch._assert((x < 1e6).all().item(), "too large")
        torch._check(bool((x < 1e6).all()))
        torch.testing.assert_close(x, x)
        assert float(x.abs().max()) < 1e6
        return super().forward(x)


class Warns(Plan):
    """Asks only to say something."""

    def __init__(self):
        super().__init__()
        self.logger = logging.getLogger("model")

    def forward(self, x):
        if x.abs().max() > 1e6:
            warnings.warn("large", stacklevel=1)
        else:
            self.logger.info("small")
        return super().forward(x)


@pytest.mark.parametrize("module", [Appends, Assigns, Guards, Asks, Checks, Warns], ids=lambda module: module.__name__)
def test_a_question_that_only_leaves_a_loop_or_stops_the_program_is_answered(module):
    stops = captured(module()).early_stops
    assert stops is not None
    assert not stops.taken
