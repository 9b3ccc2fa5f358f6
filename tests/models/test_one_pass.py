"""One pass as a layer is the operator that asapc compiles, and can be trained to be Sinkhorn's last softmax."""

import math

import pytest
import torch
from helpers.tolerances import FLOAT64, difference

from asapc.models.one_pass import OnePass
from asapc.models.sinkhorn import Sinkhorn
from asapc.models.softmax import Softmax
from asapc.ops.sliced_dual import sliced_dual_plan_ref
from asapc.types.choices import SlicedDualParams

HEADS, SIZE, EPSILON = 2, 5, 0.25


@pytest.mark.parametrize("coordinates", [3, 5])
@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("paired", [False, True])
def test_it_is_the_compiled_operator_of_the_same_bases_knots_and_weights(coordinates, pieces, paired) -> None:
    layer = OnePass(HEADS, SIZE, EPSILON, coordinates, pieces, paired).double()
    with torch.no_grad():
        for tensor in (*layer.parameters(), layer.knots):
            tensor.copy_(torch.randn_like(tensor))
    q, k = (torch.randn(2, HEADS, size, SIZE, dtype=torch.float64) for size in (6, 9))
    fit = SlicedDualParams(
        layer.query_basis, layer.key_basis, 0, layer.knots, (layer.weights,), paired=paired, one_pass=True
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(SIZE) / EPSILON
    assert difference(layer.plan(q, k), sliced_dual_plan_ref(scores, q, k, fit)) < FLOAT64


def test_it_starts_as_softmax_at_its_temperature_with_products_of_coordinates_that_are_the_scores() -> None:
    layer = OnePass(HEADS, SIZE, EPSILON)
    q, k = (torch.randn(1, HEADS, 7, SIZE) for _ in range(2))
    torch.testing.assert_close(layer.plan(q, k), Softmax().plan(q / EPSILON, k))
    products = (q @ layer.query_basis) @ (k @ layer.key_basis).transpose(-1, -2)
    torch.testing.assert_close(products, q @ k.transpose(-1, -2) / math.sqrt(SIZE) / EPSILON)


def test_trained_on_the_plans_of_a_loop_it_comes_far_closer_than_softmax() -> None:
    layer, loop = OnePass(HEADS, SIZE, 1.0), Sinkhorn(1.0, 20)
    scale = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.2])
    q, k = (scale * torch.randn(8, HEADS, 16, SIZE) + 0.3 for _ in range(2))
    train, test = slice(0, 6), slice(6, None)
    plan = loop.plan(q, k)
    error = difference(layer.plan(q[test], k[test]), plan[test])
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(40):
        optimizer.zero_grad()
        (layer.plan(q[train], k[train]) - plan[train]).square().sum().backward()
        optimizer.step()
    assert difference(layer.plan(q[test], k[test]).detach(), plan[test]) < 0.5 * error
