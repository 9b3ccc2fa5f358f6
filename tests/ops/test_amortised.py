"""A network before few half-steps on small matrices, against the same network and half-steps in the log domain."""

from itertools import pairwise

import pytest
import torch
from helpers.tolerances import FLOAT64, difference

from asapc.ops.amortised import AmortisedSinkhorn
from asapc.ops.guarded import guarded_plan_ref
from asapc.ops.sinkhorn import sinkhorn_plan_ref
from asapc.types.choices import AmortisedParams
from asapc.types.site import Floor, Guard

N, M, WIDTH = 4, 6, 8
GENERATOR = torch.Generator().manual_seed(0)
SCORES = 3 * torch.randn(3, 5, N, M, dtype=torch.float64, generator=GENERATOR)
VALUES = torch.randn(3, 5, M, 2, dtype=torch.float64, generator=GENERATOR)
FLOOR = Floor(1e-3, clamped=False)
LOWERINGS = ["materialised", "interleaved"]


def network(last):
    """Random layers to the dual of the axis that is not last."""
    sizes = N * M, WIDTH, WIDTH, N if last == "columns" else M
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o, i, generator=generator).double() / i for i, o in pairwise(sizes)]
    return AmortisedParams(tuple(weights), tuple(torch.randn(len(w), generator=generator).double() for w in weights))


def with_dual(scores, params, last):
    """Scores with the network's dual, row by row or column by column."""
    values = scores.flatten(-2)
    for number, (weight, bias) in enumerate(zip(params.weights, params.biases, strict=True)):
        values = values @ weight.T + bias
        values = values.relu() if number < 2 else values
    dim = -1 if last == "columns" else -2
    return scores - scores.mean(dim=dim, keepdim=True) + values.unsqueeze(dim)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("last", ["rows", "columns"])
@pytest.mark.parametrize("half_steps", [1, 3])
def test_half_steps_start_from_the_dual_of_the_network(half_steps, last, lowering):
    params = network(last)
    expected = sinkhorn_plan_ref(with_dual(SCORES, params, last), half_steps, last)
    operator = AmortisedSinkhorn(params, half_steps, last, (N, M), lowering=lowering)
    assert difference(operator(SCORES), expected) < FLOAT64
    assert difference(operator(SCORES, values=VALUES), expected @ VALUES) < FLOAT64
    assert difference(operator.from_kernel(SCORES.exp()), expected) < FLOAT64


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("divides", ["plan", "masses"])
@pytest.mark.parametrize("kernel", ["plain", "softmax"])
def test_constants_in_divisors_and_masses_stay(kernel, divides, lowering):
    """What a softmax does before the loop is among the half-steps that the network stands for."""
    params, mass = network("columns"), torch.tensor([2.0], dtype=torch.float64)
    guard = Guard(FLOOR, FLOOR, divides, kernel, "one", "same")
    plain = Guard(FLOOR, FLOOR, divides, "plain", "one", "same")
    operator = AmortisedSinkhorn(params, 3, "columns", (N, M), guard, None, mass, lowering)
    expected = guarded_plan_ref(with_dual(SCORES, params, "columns"), 3, "columns", plain, None, mass)
    assert difference(operator(SCORES), expected) < FLOAT64


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("factor", [0.0, 30.0, 1e4])
def test_scores_that_mislead_the_network_give_a_plan_all_the_same(factor, lowering):
    operator = AmortisedSinkhorn(network("columns"), 3, "columns", (N, M), lowering=lowering)
    plan = operator(factor * SCORES.float())
    assert torch.isfinite(plan).all()
    assert difference(plan.sum(dim=-2), torch.full((3, 5, M), N / M)) < 1e-5
    kernel = torch.zeros(1, 1, N, M)
    kernel[..., 0] = 1
    assert torch.isfinite(operator.from_kernel(kernel)).all()  # what a softmax makes of scores far apart


@pytest.mark.parametrize("last", ["rows", "columns"])
def test_what_is_added_to_all_that_a_dual_holds_changes_nothing(last):
    params = network(last)
    centre = torch.eye(M if last == "columns" else N, dtype=torch.float64)
    centre = centre - centre.mean(dim=0)
    eye = torch.eye(N if last == "columns" else M, dtype=torch.float64)
    whole = torch.kron(eye, centre) if last == "columns" else torch.kron(centre, eye)
    blind = AmortisedParams((params.weights[0] @ whole, *params.weights[1:]), params.biases)
    operator = AmortisedSinkhorn(blind, 1, last, (N, M))
    shift = torch.randn(3, 5, N, 1).double() if last == "columns" else torch.randn(3, 5, 1, M).double()
    assert difference(operator(SCORES + shift), operator(SCORES)) < FLOAT64
