"""What all backends share."""

import torch

from asapc.backends.base import RememberingRunner
from asapc.fidelity.outputs import output_names
from asapc.types.samples import Samples


class Counting:
    runtime = "counting"

    def __init__(self):
        self.calls = 0

    def __call__(self, samples):
        self.calls += 1
        return [2 * samples.inputs["x"]]


def test_a_runner_that_remembers_runs_once_on_each_part():
    runner, samples = Counting(), Samples({"x": torch.arange(6.0)})
    remembering = RememberingRunner(runner)
    for _ in range(2):
        actual = torch.cat([remembering(batch)[0] for batch in samples.batches(4)])
        assert torch.equal(actual, 2 * torch.arange(6.0))
    assert runner.calls == 2
    assert torch.equal(remembering(samples[:2])[0], torch.tensor([0.0, 2.0]))  # the same place, another length
    assert (runner.calls, remembering.runtime) == (3, "counting")


def test_outputs_that_are_known_are_not_computed():
    runner, samples = Counting(), Samples({"x": torch.arange(3.0)})
    remembering = RememberingRunner(runner)
    remembering.remember(samples[1:], [torch.ones(2)])
    assert torch.equal(remembering(samples[1:])[0], torch.ones(2))
    assert runner.calls == 0


def test_what_is_remembered_is_not_taken_for_the_names_of_outputs():
    samples = Samples({"x": torch.arange(3.0)})
    remembering = RememberingRunner(Counting())
    remembering.remember(samples, [torch.ones(3), torch.zeros(3)])
    assert output_names(remembering, remembering(samples)) == ["output 0", "output 1"]
