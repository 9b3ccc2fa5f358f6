"""Questions that a model asks of constants are answered, those of its data as far as they can be."""

import pytest
import torch
from helpers.stopping import (
    ROUNDING,
    Loop,
    captured,
    output,
    scores,
)
from helpers.tolerances import difference
from torch import nn

from asapc.errors import CaptureError


class Asks(nn.Module):
    """Does one thing or the other, by a question of its constants."""

    def __init__(self, question) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([0.5, 2.0]))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("mask", torch.tensor([True, False]), persistent=False)
        self.scale = torch.tensor(0.25)
        self.question = question

    def forward(self, x):
        return self.question(self, x)


CONSTANTS = {
    "bool of a buffer": lambda m, x: x * 2 if m.flag else x,
    "not of a buffer": lambda m, x: x * 2 if not m.flag else x,
    "item of a parameter": lambda m, x: x / m.temperature[0].item(),
    "float of a parameter": lambda m, x: x / float(m.temperature.mean()),
    "comparison of parameters": lambda m, x: x * 2 if m.temperature[0] > m.temperature[1] else x,
    "allclose of a parameter": lambda m, x: x * 2 if torch.allclose(m.temperature, torch.tensor([0.5, 2.0])) else x,
    "all of a mask": lambda m, x: x[..., :2] * m.mask if m.mask.all() else x,
    "any of a mask": lambda m, x: x[..., :2] * m.mask if m.mask.any() else x,
    "steps of a buffer": lambda m, x: sum(x.cos() for _ in range(int(m.steps))),
    "index by a buffer": lambda m, x: sum(x.cos() for _ in range(m.steps)),
    "item of an integer": lambda m, x: sum(x.cos() for _ in range(m.steps.item())),
    "list of a parameter": lambda m, x: sum(x * t for t in m.temperature.tolist()),
    "text of a parameter": lambda m, x: x * 2 if f"{m.temperature.max():.1f}" == "2.0" else x,
    "plain tensor": lambda m, x: x * 2 if m.scale < m.temperature.min() else x,
    "made in the forward": lambda m, x: x * 2 if torch.full((3,), 0.5).sum() > m.scale else x,
    "filled in place": lambda m, x: x * 2 if torch.empty(3).fill_(0.5).mul_(m.scale).sum() > 1 else x,
    "nan in a parameter": lambda m, x: x * 2 if torch.isnan(m.temperature).any() else x,
    "after a write of data elsewhere": lambda m, x: x * 2 if (x.clone().add_(1), m.scale < 1)[1] else x,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_questions_of_constants_are_answered_truthfully(name):
    module, samples = Asks(CONSTANTS[name]), scores()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    graph = captured(module, samples, early_stop="refuse")
    assert graph.early_stops is None
    actual, expected = output(graph.program.module(), samples), output(module, samples)
    assert actual.shape == expected.shape
    assert difference(actual, expected) < ROUNDING
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_tolerance_that_is_a_buffer_is_no_reason_to_stop():
    class Buffered(Loop):
        def __init__(self) -> None:
            super().__init__(lambda err, f, old, tol: err < tol * self.scale)
            self.register_buffer("scale", torch.tensor(2.0))

    graph = captured(Buffered())
    bound = Loop(lambda *of: False)
    assert difference(output(graph.program.module(), scores()), output(bound, scores())) < ROUNDING


class NumberOfData(nn.Module):
    """Uses a number that it read from its data, and asks nothing of it."""

    def forward(self, x):
        return x / x.abs().max().item()


def test_a_number_that_is_read_but_not_asked_about_stays_in_the_graph():
    samples = scores()
    graph = captured(NumberOfData(), samples)
    assert graph.early_stops is None
    for batch in (samples[:3], samples):
        assert difference(output(graph.program.module(), batch), output(NumberOfData(), batch)) < ROUNDING


def test_a_number_keeps_its_value_when_its_tensor_is_written_to():
    class Kept(nn.Module):
        def forward(self, x):
            largest = x.amax()
            before = largest.item()
            largest.mul_(2)
            return x * before + largest

    graph = captured(Kept())
    assert difference(output(graph.program.module(), scores()), output(Kept(), scores())) < ROUNDING


# Answers that would be true of the batch of the example only, or follow from nothing.
@pytest.mark.parametrize(
    "question",
    [
        lambda x: torch.arange(x.shape[0]).max() > 3,
        lambda x: torch.arange(x.shape[0]).max().item() > 3,
        lambda x: (x.long() == 0).any(),
        lambda x: x.flatten().argmax() > 2,
        lambda x: x.flatten().argmax().item() > 2,
        lambda x: torch.rand(3).argmax() > 1,
        lambda x: int(x.sum()) > 0,
    ],
)
def test_what_cannot_be_decided_is_refused(question):
    class Undecided(nn.Module):
        def forward(self, x):
            return x * 2 if question(x) else x

    with pytest.raises(CaptureError, match=r"torch\.export") as caught:
        captured(Undecided())
    assert "\n" not in str(caught.value)
