"""Which samples the finder looks at."""

import math

import pytest
import torch
from torch import nn

from asapc.capturing.export import export
from asapc.passes.find.evidence import MAX_SAMPLES, find_with_evidence, most_different, varying
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples

TOKENS, WIDTH, PADDING = 6, 8, 7


def mask(*lengths):
    return torch.arange(TOKENS) < torch.tensor(lengths).unsqueeze(-1)


LENGTHS = (6, 6, 0, 4, 2, 6)  # the third sample is padding altogether
KINDS = {
    "boolean": mask(*LENGTHS),
    "padding is true": ~mask(*LENGTHS),
    "integers": mask(*LENGTHS).long(),
    "zeros and ones": mask(*LENGTHS).float(),
    "additive": torch.zeros(6, TOKENS).masked_fill(~mask(*LENGTHS), -1e4),
    "ids": torch.full((6, TOKENS), 5) * mask(*LENGTHS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_most_and_the_least_padded_sample_are_taken_and_none_that_is_padding_altogether(kind):
    samples = Samples({"x": torch.randn(6, TOKENS, WIDTH), "mask": KINDS[kind]})
    assert set(most_different(samples)) == {3, 4}


def test_where_one_sample_is_padded_it_is_taken():
    assert 3 in most_different(Samples({"mask": mask(6, 6, 6, 5, 6)}))


def test_samples_without_padding_and_single_ones_are_taken_as_they_come():
    assert most_different(Samples({"x": torch.randn(5, TOKENS, WIDTH)})) == [0, 4]
    assert most_different(Samples({"x": torch.randn(1, TOKENS, WIDTH)})) == [0, 0]


class PaddedIds(nn.Module):
    """Its mask is of its own making: one id stands for padding, and no input shows which."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, ids):
        live, x = ids != PADDING, self.embedding(ids)
        kernel = (2 * self.q(x) @ self.k(x).mT).exp() * (live[:, :, None] & live[:, None, :])
        return self.plan(kernel) @ self.v(x)

    def plan(self, kernel):
        for _ in range(3):
            kernel = kernel / (kernel.sum(dim=-2, keepdim=True) + 1e-9)
            kernel = kernel / (kernel.sum(dim=-1, keepdim=True) + 1e-9)
        return kernel


def captured(module, samples):
    return CapturedGraph(export(module.eval(), samples[:2].inputs), samples[:2])


def ids(count, padded=()):
    drawn = torch.randint(1, PADDING, (count, TOKENS))
    for sample, length in padded:
        drawn[sample, length:] = PADDING
    return Samples({"ids": drawn})


@pytest.mark.parametrize(
    "padded", [[(37, 4)], [(0, 0), (39, 0), (5, 3)]], ids=["one in the middle", "whole at the ends"]
)
def test_a_mask_that_the_model_makes_is_found_in_the_values_of_the_graph(padded):
    samples = ids(40, padded)
    [site] = find_with_evidence(captured(PaddedIds(), samples), samples).sites
    assert (site.loop.half_steps, site.loop.last, site.loop.masked) == (6, "rows", True)


def test_without_any_padding_the_loop_is_refused_as_before():
    samples = ids(MAX_SAMPLES + 1, [(MAX_SAMPLES, 3)])[:40]
    findings = find_with_evidence(captured(PaddedIds(), samples), samples)
    assert findings.sites == ()
    [miss] = findings.misses
    assert "constant on the samples" in miss.reason
    assert "padding" in miss.hint


class PerSample(nn.Module):
    """Asks no sample twice: each has one number, and most have the same."""

    def forward(self, x):
        return (x > 0).float(), torch.zeros_like(x)


@pytest.mark.parametrize("odd", [1, 17, 40, 69])
def test_two_samples_are_told_apart_wherever_the_other_one_stands(odd):
    samples = Samples({"x": -torch.ones(70, 1)})
    samples.inputs["x"][odd] = 1.0
    graph = captured(PerSample(), samples)
    names = [node.name for node in graph.program.module().graph.nodes if node.op == "call_function"]
    one, other = varying(graph, names, samples)
    assert odd in (one, other)
    assert one != other


def test_scores_of_minus_infinity_leave_no_gap_in_what_is_looked_at():
    class Logs(PaddedIds):
        def plan(self, kernel):
            scores = kernel.log()
            for axis in (-2, -1) * 3:
                scores = scores.log_softmax(dim=axis).nan_to_num(nan=-math.inf, neginf=-math.inf)
            return scores.exp()

    samples = ids(20, [(0, 0), (19, 4)])
    [site] = find_with_evidence(captured(Logs(), samples), samples).sites
    assert (site.loop.half_steps, site.loop.last, site.loop.masked) == (6, "rows", True)
