"""The studies' teachers are trained by benchmarks/scaling_form.py; it must be the loop that their checkpoints hold."""

import runpy

import pytest
import torch
from helpers.paths import ROOT
from helpers.tolerances import FLOAT64

from asapc.models.vit import sinkhorn

FILE = ROOT / "benchmarks" / "scaling_form.py"
trained_sinkhorn = runpy.run_path(str(FILE))["trained_sinkhorn"]


@pytest.mark.parametrize("spread", [1, 30, 300])
@pytest.mark.parametrize("iterations", [1, 2, 6, 7, 20])
def test_plan_and_gradient_are_those_of_the_loop(iterations: int, spread: int) -> None:
    scores = (spread * torch.randn(2, 2, 9, 12, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(2, 2, 9, 12, dtype=torch.float64)
    plan, expected = trained_sinkhorn(scores, iterations), sinkhorn(scores, iterations)
    assert (plan - expected).norm() <= FLOAT64 * expected.norm()
    (gradient,) = torch.autograd.grad((plan * weights).sum(), scores)
    (expected,) = torch.autograd.grad((expected * weights).sum(), scores)
    assert (gradient - expected).norm() <= FLOAT64 * expected.norm() + 1e-12


def test_the_sharpest_scores_stay_finite_in_float32() -> None:
    scores = (1000 * torch.randn(1, 2, 64, 64)).requires_grad_()
    plan = trained_sinkhorn(scores, 25)
    plan.square().sum().backward()
    assert plan.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
