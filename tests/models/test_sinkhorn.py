"""The loop of `models/sinkhorn.py` against the library's reference, and its forms for training against the loop."""

import math

import pytest
import torch
from helpers.tolerances import FLOAT64, difference
from torch import Tensor

from asapc.models.sinkhorn import FORMS, Sinkhorn, sinkhorn
from asapc.ops.sinkhorn import sinkhorn_plan_ref

TRAINED = pytest.mark.parametrize("form", ["scaling", "recompute"])


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_the_loop_is_sinkhorn_of_twice_as_many_half_steps(iterations: int) -> None:
    scores = 4 * torch.randn(2, 3, 7, 5, dtype=torch.float64)
    expected = sinkhorn_plan_ref(scores, half_steps=2 * iterations, last="rows")
    assert difference(sinkhorn(scores, iterations), expected) < FLOAT64


def test_with_masks_it_is_sinkhorn_of_scores_that_are_minus_infinity() -> None:
    scores = 4 * torch.randn(2, 3, 7, 5, dtype=torch.float64)
    query_mask, key_mask = torch.rand(2, 7) < 0.6, torch.rand(2, 5) < 0.6
    live = query_mask[:, None, :, None] & key_mask[:, None, None, :]
    expected = sinkhorn_plan_ref(scores.masked_fill(~live, -math.inf), half_steps=8, last="rows")
    assert difference(sinkhorn(scores, 4, query_mask, key_mask), expected) < FLOAT64


@TRAINED
@pytest.mark.parametrize("spread", [1, 30, 300])
@pytest.mark.parametrize("iterations", [1, 2, 6, 7, 20])
def test_plan_and_gradient_of_the_other_forms_are_those_of_the_loop(form: str, iterations: int, spread: int) -> None:
    scores = (spread * torch.randn(2, 2, 9, 12, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(2, 2, 9, 12, dtype=torch.float64)
    plan, expected = FORMS[form](scores, iterations, None, None), sinkhorn(scores, iterations)
    assert difference(plan, expected) < FLOAT64
    (gradient,) = torch.autograd.grad((plan * weights).sum(), scores)
    (expected,) = torch.autograd.grad((expected * weights).sum(), scores)
    assert (gradient - expected).norm() <= FLOAT64 * expected.norm() + 1e-12


@TRAINED
def test_the_sharpest_scores_stay_finite_in_float32(form: str) -> None:
    scores = (1000 * torch.randn(1, 2, 64, 64)).requires_grad_()
    plan = FORMS[form](scores, 25, None, None)
    plan.square().sum().backward()
    assert plan.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_the_loop_keeps_most_matrices_for_its_gradient_and_recompute_the_first_plan_and_the_last() -> None:
    q, k = (torch.randn(1, 1, size, 3, requires_grad=True) for size in (11, 13))

    def kept(form: str) -> int:
        matrices: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape[-2:] in ((11, 13), (13, 11)):
                matrices.add(tensor.data_ptr())
            return tensor

        kernel = Sinkhorn(0.25, 20, form)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            plan = kernel.plan(q, k)
        assert plan.requires_grad
        return len(matrices)

    assert kept("recompute") == 2
    assert kept("scaling") == 2 + 4  # a kernel for five iterations
    assert kept("log") >= 40


def test_the_form_may_be_set_anew() -> None:
    q, k = torch.randn(2, 1, 2, 9, 4, dtype=torch.float64)
    kernel = Sinkhorn(0.25, 12, "recompute")
    plan = kernel.plan(q, k)
    kernel.form = "log"
    assert difference(plan, kernel.plan(q, k)) < FLOAT64
