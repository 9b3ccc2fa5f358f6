"""What the study puts in the place of loops, on a small teacher that was not trained."""

import pytest
import torch
from helpers.tolerances import FLOAT32

from asapc.commands.study import study_module
from asapc.fidelity.sites import site_fidelity
from asapc.models.pointset import PointTransformer
from asapc.passes.record import record
from asapc.types.samples import Samples
from benchmarks.study.forms import BATCH, OfPoints, layer, sliced_transport, written
from benchmarks.study.frozen import captured, errors
from benchmarks.study.sinks import look, tokens_by_depth

SIZES = {"width": 16, "depth": 2, "heads": 2}


def studied(iterations: int):
    torch.manual_seed(0)
    model, points = PointTransformer(**SIZES, iterations=iterations), torch.randn(12, 24, 3)
    return study_module(model, Samples({"points": points[:4]}), Samples({"points": points[4:]}))


@pytest.fixture(scope="module")
def teacher():
    return studied(20)


@pytest.fixture(scope="module")
def twin():
    return studied(0)


def test_the_loops_as_written_are_those_of_the_teacher(teacher):
    forms = written(teacher)
    for fidelity in site_fidelity(teacher.graph, teacher.sites, forms, teacher.held_out).values():
        assert fidelity.relc < 10 * FLOAT32
    for site in teacher.sites:
        points = captured(teacher, site)
        module = layer(site, forms[site.name])
        with torch.no_grad():
            output = module(*points.inputs.values())
        node = site.wiring.attention.output.node
        expected = record(teacher.graph.program.module(), teacher.held_out[:BATCH], [node])[node]
        assert (output - expected).norm() < 10 * FLOAT32 * expected.norm()


def test_errors_are_relative_to_outputs_with_their_mean_and_without(teacher):
    forms = sliced_transport(teacher, 8)
    site = teacher.sites[0]
    loop, module = (layer(site, of_sites[site.name]) for of_sites in (written(teacher), forms))
    points = captured(teacher, site).inputs.values()
    with torch.no_grad():
        expected, output = loop(*points), module(*points)
    error = (output - expected).norm()
    centred = (expected - expected.mean(dim=-2, keepdim=True)).norm()
    result = errors(teacher, {"sliced": forms}, teacher.held_out[:BATCH])["sliced"]
    assert result["relc"][0] == pytest.approx(float(error / centred), rel=1e-3)
    assert result["relative"][0] == pytest.approx(float(error / expected.norm()), rel=1e-3)


def test_depths_are_the_tokens_before_the_first_block_and_after_each(teacher):
    model, samples = teacher.loaded.module, teacher.held_out
    seen = []
    handles = [model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
    handles += [block.register_forward_hook(lambda *parts: seen.append(parts[-1])) for block in model.blocks]
    with torch.no_grad():
        model(*samples.inputs.values())
    for handle in handles:
        handle.remove()
    names = tokens_by_depth(teacher.graph.program.graph)
    values = record(teacher.graph.program.module(), samples, names)
    assert len(names) == len(seen) == 3
    for name, expected in zip(names, seen, strict=True):
        torch.testing.assert_close(values[name], expected, rtol=FLOAT32, atol=FLOAT32)


def test_converged_plans_have_no_sink_and_softmax_has(teacher, twin):
    loop, softmax = (look(of, {}, of.held_out) for of in (teacher, twin))
    assert loop["largest_column"] == pytest.approx([1.0, 1.0], abs=1e-2)
    assert min(softmax["top_share"]) > 1.01
    assert loop["rank"][0] == pytest.approx(softmax["rank"][0], rel=1e-5)  # before any attention


def test_a_compiled_model_is_looked_at_with_what_its_own_layers_get(teacher):
    nothing = {site.name: OfPoints(Mean()) for site in teacher.sites}
    of_mean, of_loop = look(teacher, nothing, teacher.held_out), look(teacher, {}, teacher.held_out)
    assert of_mean["top_share"] == pytest.approx([1.0, 1.0])
    assert of_mean["rank"][0] == of_loop["rank"][0]
    assert of_mean["rank"][1:] != of_loop["rank"][1:]
    rewritten = look(teacher, written(teacher), teacher.held_out)
    assert rewritten["rank"] == pytest.approx(of_loop["rank"], rel=1e-3)
    assert rewritten["largest_column"] == pytest.approx(of_loop["largest_column"], rel=1e-3)


class Mean(torch.nn.Module):
    """Attention that pays each key the same."""

    def plan(self, q, k, query_mask, key_mask):
        return torch.full((*q.shape[:3], k.shape[2]), 1 / k.shape[2])

    def forward(self, q, k, v):
        return self.plan(q, k, None, None) @ v
