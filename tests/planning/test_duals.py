"""What figures show of a sliced dual is the loop's own dual, and the operator's estimate of it."""

from dataclasses import replace

import pytest
import torch
from helpers.fitted import cached_teacher, sound

from asapc.passes.record import record
from asapc.planning.duals import MAX_POINTS, true_and_predicted


@pytest.mark.parametrize(
    ("side", "closure_steps"), [("keys", 0), ("keys", 1), ("queries", 1)], ids=["keys", "closure", "queries"]
)
def test_an_estimate_lies_near_the_dual_that_it_was_fitted_to(side, closure_steps):
    teacher = cached_teacher(sound)
    params = teacher.calibrate(closure_steps=closure_steps, side=side)
    names = [operand.node for operand in teacher.site.wiring.operands]
    values = record(teacher.graph.program.module(), teacher.samples[:2], names)
    for head in range(teacher.site.loop.heads):
        true, predicted = true_and_predicted(teacher.site, params, values, head)
        assert 0 < len(true) == len(predicted) <= MAX_POINTS
        assert torch.corrcoef(torch.stack([true, predicted]))[0, 1] > 0.9
        assert (true - predicted).square().mean() < 0.2 * true.square().mean()
    last = replace(params, weights=(*params.weights[:-1], torch.zeros_like(params.weights[-1])))
    assert true_and_predicted(teacher.site, last, values, 0)[1].abs().max() == 0
    assert torch.equal(true_and_predicted(teacher.site, last, values, head)[0], true)
