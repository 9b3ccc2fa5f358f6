"""Sinkhorn loops are found in every coding style, with their half-steps, temperatures and names."""

import math

import pytest
import torch
from helpers.attention import (
    HEADS,
    KEYS,
    QUERIES,
    STYLES,
    WIDTH,
    Attention,
    division_in_place,
    find,
    log_domain,
    potentials,
    sinkhorn,
    softmax,
    source_text,
)
from helpers.slow import slow
from helpers.tolerances import FLOAT32, FLOAT64
from torch import nn

from asapc.capturing.export import export
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
@pytest.mark.parametrize(("half_steps", "last"), [(5, "rows"), (10, "columns"), slow(2, "rows"), slow(3, "columns")])
def test_every_coding_style_is_recognised(style, half_steps, last):
    findings = find(Attention(sinkhorn(style, half_steps, last)))
    assert findings.misses == ()
    [site] = findings.sites
    assert (site.loop.half_steps, site.loop.last) == (half_steps, last)
    assert site.epsilon == pytest.approx([0.5, 0.5], rel=FLOAT64)
    assert (site.loop.heads, site.loop.queries, site.loop.keys, site.head_dim) == (
        HEADS,
        QUERIES,
        QUERIES,
        WIDTH // HEADS,
    )


class ScalesInPlace(Attention):
    def scaled(self, scores):
        return scores.div_(math.sqrt(WIDTH // HEADS) * self.epsilon)


def test_a_loop_that_overwrites_the_scores_is_recognised():
    [site] = find(ScalesInPlace(sinkhorn(division_in_place, 5, "rows"))).sites
    assert (site.loop.half_steps, site.loop.last) == (5, "rows")
    assert site.epsilon == pytest.approx([0.5, 0.5], rel=FLOAT64)


@pytest.mark.parametrize("half_steps", [2, 3, slow(4), slow(7), slow(20), slow(21), 40])
@pytest.mark.parametrize("last", ["rows", "columns"])
def test_even_and_odd_numbers_of_half_steps_are_counted_from_either_axis(half_steps, last):
    [site] = find(Attention(sinkhorn(log_domain, half_steps, last))).sites
    assert (site.loop.half_steps, site.loop.last) == (half_steps, last)


@pytest.mark.parametrize("epsilon", [0.05, 0.25, 1.0, 4.0])
def test_the_temperature_is_read_off_the_plan(epsilon):
    [site] = find(Attention(sinkhorn(log_domain, 6, "rows"), epsilon)).sites
    assert site.loop.half_steps == 6
    assert site.epsilon == pytest.approx([epsilon, epsilon], rel=FLOAT64)


def test_a_temperature_learned_for_each_head_is_read_off_head_by_head():
    attention = Attention(sinkhorn(log_domain, 5, "rows"))
    attention.epsilon = nn.Parameter(torch.tensor([0.1, 0.7])[:, None, None])
    [site] = find(attention).sites
    # The parameter is float32.
    assert site.epsilon == pytest.approx([0.1, 0.7], rel=FLOAT32)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_cross_attention_with_fewer_queries_than_keys_is_recognised(style):
    findings = find(
        Attention(sinkhorn(style, 6, "rows")),
        x=torch.randn(3, QUERIES, WIDTH),
        context=torch.randn(3, KEYS, WIDTH),
    )
    [site] = findings.sites
    assert (site.loop.half_steps, site.loop.last, site.loop.queries, site.loop.keys) == (6, "rows", QUERIES, KEYS)


def test_cross_attention_that_ends_on_columns_is_recognised():
    inputs = {"x": torch.randn(3, KEYS, WIDTH), "context": torch.randn(3, QUERIES, WIDTH)}
    [site] = find(Attention(sinkhorn(potentials, 7, "columns")), **inputs).sites
    assert (site.loop.half_steps, site.loop.last, site.loop.queries, site.loop.keys) == (7, "columns", KEYS, QUERIES)


def test_a_site_names_the_nodes_that_hold_queries_keys_values_and_output():
    module = Attention(sinkhorn(log_domain, 5, "rows")).eval()
    samples = Samples({"x": torch.randn(3, QUERIES, WIDTH)})
    graph = CapturedGraph(export(module, samples[:2].inputs), samples[:2])
    [site] = find_sinkhorn(graph, samples).sites
    nodes = {node.name: node for node in graph.program.module().graph.nodes}
    wiring, product, attention = site.wiring, site.wiring.product, site.wiring.attention
    assert product.is_scores
    assert nodes[wiring.scores.node].args == (nodes[product.query.node], nodes[product.key.node])
    assert nodes[attention.output.node].args == (nodes[wiring.plan.node], nodes[attention.value.node])
    assert nodes[product.key.node].meta["val"].shape[-2:] == (WIDTH // HEADS, QUERIES)
    operands = (wiring.scores, wiring.plan, product.query, product.key, attention.value, attention.output)
    assert [operand.axes for operand in operands] == ["bhnm", "bhnm", "bhnd", "bhdm", "bhme", "bhne"]
    assert (wiring.groups, site.loop.heads, wiring.applied) == (1, HEADS, True)
    assert (wiring.logarithm, wiring.exponential) == (False, False)


def test_the_share_of_a_site_is_a_share():
    sites = find(Twice()).sites
    assert all(0 < site.share < 1 for site in sites)
    assert sum(site.share for site in sites) < 1


def test_the_source_line_of_a_site_is_where_the_plan_meets_the_values():
    # Also where the module that holds it is called by another.
    for module in (Attention(sinkhorn(log_domain, 5, "rows")), Twice()):
        assert all("plan @ v" in source_text(site) for site in find(module).sites)


class DropsAndReturnsPlan(Attention):
    def __init__(self, normalise):
        super().__init__(normalise)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.heads(self.to_q(x)), self.heads(self.to_k(x)), self.heads(self.to_v(x))
        weights = self.normalise(self.scaled(q @ k.transpose(-1, -2)))
        plan = self.drop(weights)
        return plan @ v, plan


def test_a_plan_is_named_after_where_it_is_made_and_not_after_modules_of_torch_that_pass_it_on():
    module = nn.Sequential(DropsAndReturnsPlan(sinkhorn(log_domain, 5, "rows")))
    [site] = find(module, input=torch.randn(3, QUERIES, WIDTH)).sites
    assert site.name == "0"
    assert "weights = self.normalise" in source_text(site)


class EndsInModuleOfTorch(Attention):
    def __init__(self):
        super().__init__(nn.Softmax(dim=-1))

    def scaled(self, scores):
        return super().scaled(scores).log_softmax(dim=-2)


def test_a_loop_that_ends_in_a_module_of_torch_stands_where_that_is_called():
    for returns_plan in (False, True):
        module = EndsInModuleOfTorch()
        module.returns_plan = returns_plan
        [site] = find(module).sites
        assert (site.name, site.loop.half_steps) == ("attention", 2)
        assert ("self.normalise" if returns_plan else "plan @ v") in source_text(site)


class OneLine(Attention):
    """A softmax and a Sinkhorn loop in one line."""

    def __init__(self, normalise):
        super().__init__(normalise)
        self.blocks = nn.ModuleList([Attention(softmax), Attention(normalise)])

    def one(self, x, normalise):
        scores = self.scaled(self.to_q(x) @ self.to_k(x).mT)
        return normalise(scores) @ self.to_v(x)

    def forward(self, x):
        return self.one(x, self.normalise) + self.one(x, softmax)


def test_a_line_with_a_site_has_no_miss():
    findings = find(OneLine(sinkhorn(log_domain, 5, "rows")))
    assert [site.loop.half_steps for site in findings.sites] == [5]
    assert findings.misses == ()


def test_finding_does_not_change_the_graph():
    samples = Samples({"x": torch.randn(3, QUERIES, WIDTH)})
    graph = CapturedGraph(export(Attention(sinkhorn(division_in_place, 5, "rows")), samples[:2].inputs), samples[:2])
    before = str(graph.program)
    assert len(find_sinkhorn(graph, samples).sites) == 1
    assert str(graph.program) == before


class Twice(nn.Module):
    """The same type of attention in two places, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[Attention(sinkhorn(log_domain, t, "rows")) for t in (3, 5)])

    def forward(self, x):
        return self.blocks[1](self.blocks(x))


def test_sites_are_named_after_their_modules_in_the_order_of_the_graph_and_never_alike():
    sites = find(Twice()).sites
    assert [site.loop.half_steps for site in sites] == [3, 5, 5]
    names = [site.name for site in sites]
    assert names[:2] == ["blocks.0", "blocks.1"]
    assert len(set(names)) == 3


class Learned(nn.Module):
    """Cross-attention from learned queries, the scale on one side, on both or on the scores."""

    def __init__(self, scaled):
        super().__init__()
        self.scaled, self.seeds = scaled, nn.Parameter(torch.randn(6, WIDTH))
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def scale(self, place, value):
        return value * 0.5 if place in self.scaled else value

    def forward(self, x):
        q = self.scale("seeds", self.seeds).expand(x.shape[0], -1, -1)
        q = self.scale("queries", self.to_q(q) if "layer" in self.scaled else q)
        scores = self.scale("scores", q @ self.scale("keys", self.to_k(x)).mT)
        return sinkhorn(log_domain, 6, "rows")(scores) @ self.to_v(x)


@pytest.mark.parametrize(
    "scaled",
    [("seeds",), ("queries",), ("layer", "queries"), ("keys",), ("queries", "keys")],
    ids="-".join,
)
def test_a_scale_counts_on_whichever_side_it_stands(scaled):
    [site] = find(Learned(scaled)).sites
    factor = 0.5 ** len([place for place in scaled if place != "layer"])
    assert site.epsilon == pytest.approx([1 / (WIDTH**0.5 * factor)], rel=FLOAT32)
