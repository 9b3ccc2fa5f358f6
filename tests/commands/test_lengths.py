"""What follows the length of the inputs is carried along at every length that is declared, or refused."""

import pytest
import torch
from helpers.relowering import outputs, worst
from torch import nn

from asapc.commands.study import study as open_study
from asapc.commands.study import study_module
from asapc.config import CompileConfig
from asapc.errors import CaptureError, OptionError
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import exact_operator
from asapc.types.samples import Samples

STEPS, WIDTH, LENGTH = 10, 16, 16


def loop(scores):
    for step in range(STEPS):
        scores = scores.log_softmax(dim=-2 + step % 2)
    return scores.exp()


def distances(scores):
    places = torch.arange(scores.shape[-1])
    return (places[:, None] - places).abs()


class Attention(nn.Module):
    def __init__(self, plan, longest=64):
        super().__init__()
        self.plan, self.position = plan, nn.Parameter(torch.randn(longest, WIDTH))
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        q, k, v = (
            layer(x + self.position[: x.shape[1]]).unflatten(-1, (2, 8)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return (self.plan(q @ k.mT) @ v).transpose(1, 2).flatten(2)


def study(plan, dynamic="seq=8:64", length=LENGTH, **sizes):
    torch.manual_seed(0)
    module = Attention(plan, **sizes).eval()
    samples = Samples({"x": torch.randn(4, length, WIDTH)})
    return study_module(module, samples, config=CompileConfig(dynamic=dynamic)), module


CARRIED = {
    "none": loop,
    "inverse": lambda s: loop(s * (16 / s.shape[-1])),
    "root": lambda s: loop(s * s.shape[-1] ** 0.5),
    "bias": lambda s: loop(s - distances(s) / s.shape[-1]),
}
REFUSED = {
    "window": (lambda s: loop(s - 3.0 * (distances(s) > 20)), "seq=36.*the outputs differ"),
    "masses": (lambda s: loop(s) * s.shape[-1], "the loop of .* changes with the length"),
}


@pytest.mark.parametrize("name", CARRIED)
def test_a_scale_that_follows_the_length_comes_in_with_the_scores(name):
    teacher, module = study(CARRIED[name])
    [site] = teacher.open_sites
    assert site.loop.half_steps == STEPS
    graph = teacher.open_graph.program.module()
    changed = RewriteSinkhorn([site], {site.name: exact_operator(site, wide=True)})(graph).program
    for length in (8, 23, 64):
        inputs = {"x": torch.randn(3, length, WIDTH)}
        assert worst(outputs(changed, inputs), outputs(module, inputs)) < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_what_follows_the_length_otherwise_is_refused(name):
    plan, words = REFUSED[name]
    with pytest.raises(CaptureError, match=words) as caught:
        study(plan)
    assert "--dynamic" in caught.value.hint


class Mixed(nn.Module):
    """Mixes four streams by a 4 x 4 matrix for each token; samples and tokens on one axis where they are flattened."""

    def __init__(self, flat):
        super().__init__()
        self.flat, self.mix, self.out = flat, nn.Linear(WIDTH, 16), nn.Linear(4, 4)

    def forward(self, x):
        scores, streams = self.mix(x).unflatten(-1, (4, 4)), x.unflatten(-1, (4, 4))
        if self.flat:
            return self.out(loop(scores.flatten(0, 1)) @ streams.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.out(loop(scores) @ streams)


def mixed(flat):
    torch.manual_seed(0)
    module = Mixed(flat).eval()
    samples = Samples({"x": torch.randn(8, LENGTH, WIDTH)})
    return study_module(module, samples, config=CompileConfig(dynamic="seq=2:64")), module


@pytest.mark.parametrize("flat", [False, True])
def test_matrices_of_tokens_are_as_many_as_there_are_tokens(flat):
    teacher, module = mixed(flat)
    [site] = teacher.open_sites
    assert site.loop.open_heads
    graph = teacher.open_graph.program.module()
    changed = RewriteSinkhorn([site], {site.name: exact_operator(site)})(graph).program
    for length in (2, 23, 64):
        inputs = {"x": torch.randn(3, length, WIDTH)}
        assert worst(outputs(changed, inputs), outputs(module, inputs)) < 1e-5


def test_an_exported_model_is_told_that_its_axes_are_fixed(tmp_path):
    module, x = Attention(loop).eval(), torch.randn(32, LENGTH, WIDTH)
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(module, (x[:2],), dynamic_shapes=({0: batch},)), tmp_path / "model.pt2")
    torch.save({"x": x}, tmp_path / "samples.pt")
    with pytest.raises(OptionError, match="axes are as they were exported"):
        open_study(tmp_path / "model.pt2", CompileConfig(dynamic="seq=8:64", calib=tmp_path / "samples.pt"))


def test_a_plan_that_is_small_on_the_samples_alone_takes_the_general_form():
    teacher, module = study(loop, dynamic="seq=4:64", length=8)
    [site] = teacher.open_sites
    assert site.loop.open_lengths
    assert not site.loop.small
    changed = RewriteSinkhorn([site], {site.name: exact_operator(site)})(teacher.open_graph.program.module()).program
    for length in (4, 23):
        inputs = {"x": torch.randn(3, length, WIDTH)}
        assert worst(outputs(changed, inputs), outputs(module, inputs)) < 1e-5


def test_a_length_that_the_model_does_not_take_is_named():
    with pytest.raises(CaptureError, match="seq"):
        study(loop, longest=48)
