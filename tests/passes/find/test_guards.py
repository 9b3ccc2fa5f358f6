"""Constants that keep divisors from zero are read off a loop, and the exact form carries them."""

import pytest
import torch
from helpers.attention import QUERIES, Attention, find
from helpers.relowering import outputs, worst
from torch import nn

from asapc.capturing.export import export
from asapc.ops.guarded import guarded_plan_ref
from asapc.passes.find.probe import difference
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import exact_operator
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples

TURNS = 5


def divided(kernel, constant, start="rows", limited=False):
    """The plan is divided by its own sums."""
    for _ in range(TURNS):
        for dim in (-1, -2) if start == "rows" else (-2, -1):
            sums = kernel.sum(dim, keepdim=True)
            kernel = kernel / (sums.clamp_min(constant) if limited else sums + constant)
    return kernel


def by_vectors(scores, divide, rows=1.0, columns=1.0, of_columns=None):
    """Masses are divided by the sums of the kernel that the other vector scales."""
    kernel = scores.exp()
    u = torch.ones_like(kernel[..., :1])
    for _ in range(TURNS):
        v = (of_columns or divide)(columns, (kernel * u).sum(-2, keepdim=True))
        u = divide(rows, (kernel * v).sum(-1, keepdim=True))
    return u * kernel * v


def add(constant):
    return lambda mass, total: mass / (total + constant)


def limit(constant):
    return lambda mass, total: mass / total.clamp_min(constant)


def divided_by_two(plan, of_rows, of_columns):
    for _ in range(TURNS):
        plan = of_columns(plan, plan.sum(-2, keepdim=True))
        plan = of_rows(plan, plan.sum(-1, keepdim=True))
    return plan


def by_logarithms(scores, constant):
    f = torch.zeros_like(scores[..., :1])
    for _ in range(TURNS):
        g = -torch.log((scores + f).exp().sum(-2, keepdim=True) + constant)
        f = -torch.log((scores + g).exp().sum(-1, keepdim=True) + constant)
    return (scores + f + g).exp()


def by_log_plans(plan, constant):
    """Exponentials of the scores as they are: of a hundred times the samples' they overflow, to a plan of zeros."""
    for _ in range(TURNS):
        for dim in (-2, -1):
            plan = plan - (plan.exp().sum(dim, keepdim=True) + constant).log()
    return plan.exp()


LOOPS = {
    "division": lambda s: divided(s.exp(), 1e-8),
    "division_by_a_large_constant": lambda s: divided(s.exp(), 0.1),
    "columns_first": lambda s: divided(s.exp(), 1e-6, "columns"),
    "less_the_largest_of_rows": lambda s: divided((s - s.amax(-1, keepdim=True)).exp(), 1e-6),
    "less_the_largest_of_rows_and_limited": lambda s: divided((s - s.amax(-1, keepdim=True)).exp(), 1e-3, limited=True),
    "less_the_largest_of_all": lambda s: divided((s - s.amax((-2, -1), keepdim=True)).exp(), 1e-6),
    "after_softmax": lambda s: divided(s.softmax(-1), 1e-6, "columns"),
    "after_softmax_and_a_constant": lambda s: divided(s.softmax(-1) + 1e-6, 1e-6, "columns"),
    "vectors": lambda s: by_vectors(s, add(1e-6)),
    "vectors_that_are_limited": lambda s: by_vectors(s, limit(1e-4)),
    "vectors_to_uniform_masses": lambda s: s.shape[-2] * by_vectors(s, add(1e-6), 1 / s.shape[-2], 1 / s.shape[-1]),
    "logarithms": lambda s: by_logarithms(s, 1e-6),
    "logarithms_of_plans": lambda s: by_log_plans(4 * s, 1e-9),
    "one_of_rows_and_one_of_columns": lambda s: divided_by_two(s.exp(), add(1e-6), add(1e-3)),
    "one_of_rows_and_one_of_columns_after_softmax": lambda s: divided_by_two(s.softmax(-1), add(1e-3), add(1e-6)),
    "limited_rows_and_added_columns": lambda s: divided_by_two(s.exp(), limit(1e-2), add(1e-6)),
    "two_limits": lambda s: divided_by_two((s - s.amax(-2, keepdim=True)).exp(), limit(1e-3), limit(1e-1)),
    "of_vectors_each_its_own": lambda s: by_vectors(s, add(1e-3), of_columns=limit(1e-2)),
    "of_columns_alone": lambda s: divided_by_columns(s),
    "an_offset_before_the_exponential": lambda s: divided((2 * s - 4).exp(), 1e-5),
}


def divided_by_columns(scores):
    plan = scores.exp()
    for _ in range(TURNS):
        plan = plan / (plan.sum(-2, keepdim=True) + 1e-3)
        plan = plan / plan.sum(-1, keepdim=True)
    return plan


def found(module, x):
    graph = CapturedGraph(export(module, {"x": x[:2]}), Samples({"x": x[:2]}))
    return graph, find_sinkhorn(graph, Samples({"x": x[:3]}))


@pytest.mark.parametrize("name", LOOPS)
def test_the_exact_form_carries_the_constant_at_any_scale(name):
    torch.manual_seed(0)
    module = Attention(LOOPS[name]).double().eval()
    x = torch.randn(5, QUERIES, 16, dtype=torch.float64)
    graph, findings = found(module, x)
    [site] = findings.sites
    assert site.loop.guard is not None
    changed = RewriteSinkhorn([site], {site.name: exact_operator(site)})(graph.program.module()).program
    for scale in (0.1, 1.0, 3.0, 10.0, 30.0):
        inputs = {"x": scale**0.5 * x}
        assert worst(outputs(changed, inputs), outputs(module, inputs)) < 1e-9, scale


# The scores of the others are not those that the function takes.
@pytest.mark.parametrize(
    "name",
    sorted(LOOPS.keys() - {"an_offset_before_the_exponential", "after_softmax_and_a_constant", "logarithms_of_plans"}),
)
def test_a_guard_is_the_same_loop_on_scores_far_from_the_samples(name):
    torch.manual_seed(0)
    x = torch.randn(3, QUERIES, 16, dtype=torch.float64)
    _, findings = found(Attention(LOOPS[name]).double().eval(), x)
    [loop] = (site.loop for site in findings.sites)
    scores = torch.randn(2, 3, loop.queries, loop.keys, dtype=torch.float64)
    for shift in (-25.0, -5.0, 5.0, 25.0):
        shifted = scores + shift * (1 + torch.rand(loop.queries, 1, dtype=torch.float64))
        plan = guarded_plan_ref(shifted, loop.half_steps, loop.last, loop.guard, loop.row_mass, loop.column_mass)
        assert difference(plan, LOOPS[name](shifted)) < 1e-9, shift


def by_turns(constants):
    """Other constants in each turn."""

    def plan(scores):
        kernel = scores.exp()
        for constant in constants:
            kernel = divided(kernel, constant)
        return kernel

    return plan


@pytest.mark.parametrize("plan", [by_turns((1e-2, 1e-1, 1.0)), by_turns((1e-2, 1.0))])
def test_constants_that_differ_from_turn_to_turn_are_refused_where_they_act(plan):
    findings = find(Attention(plan))
    assert findings.sites == ()
    assert any("one in all of columns" in miss.reason for miss in findings.misses), findings.misses


class Mixed(nn.Module):
    """A 4 x 4 matrix for each token mixes four streams, as hyper-connections do; applied transposed."""

    def __init__(self):
        super().__init__()
        self.inner, self.mix, self.out = nn.Linear(8, 4 * 6), nn.Linear(24, 16), nn.Linear(24, 5)

    def forward(self, x):
        streams = self.inner(x).unflatten(-1, (4, 6))
        scores = 2 * self.mix(streams.flatten(2).tanh()).unflatten(-1, (4, 4))
        plan = divided(scores.softmax(-1) + 1e-6, 1e-6, "columns")
        return self.out((plan.mT @ streams).flatten(2))


def test_the_mixing_of_hyper_connections_is_exact():
    torch.manual_seed(0)
    module = Mixed().double().eval()
    x = torch.randn(5, 12, 8, dtype=torch.float64)
    graph, findings = found(module, x)
    [site] = findings.sites
    assert (site.loop.half_steps, site.loop.last) == (2 * TURNS, "columns")  # of the transpose
    changed = RewriteSinkhorn([site], {site.name: exact_operator(site)})(graph.program.module()).program
    for scale in (1.0, 10.0, 100.0):
        assert worst(outputs(changed, {"x": scale * x}), outputs(module, {"x": scale * x})) < 1e-9
