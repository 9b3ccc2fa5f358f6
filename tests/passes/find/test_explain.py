"""What a loop does on other inputs than the samples is carried along, or it is no site: clamps, thresholds, batches."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.attention import QUERIES, Attention, find, log_domain, order, source_text
from helpers.relowering import outputs, worst
from helpers.slow import slow, slow_beyond
from torch import nn

from asapc.capturing.export import export
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import exact_operator
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples

STEPS = 10
AXES = order(STEPS, "rows")
DIMS = {"rows": -1, "columns": -2}
# Of the scores, against those that the finder sees.
SCALES = (0.1, 1.0, 3.0, 10.0, 30.0)


def loop(scores):
    return log_domain(scores, AXES)


def kernel_loop(kernel, guard=lambda total: total):
    for axis in AXES:
        kernel = kernel / guard(kernel.sum(dim=DIMS[axis], keepdim=True))
    return kernel


def vectors(scores, limit):
    kernel = scores.exp()
    u, v = torch.ones_like(scores[..., :1]), torch.ones_like(scores[..., :1, :])
    for axis in AXES:
        if axis == "rows":
            u = limit(1 / (kernel * v).sum(dim=-1, keepdim=True))
        else:
            v = limit(1 / (kernel * u).sum(dim=-2, keepdim=True))
    return u * kernel * v


def potentials(scores, limit):
    f, g = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[..., :1, :])
    for axis in AXES:
        if axis == "rows":
            f = limit(-torch.logsumexp(scores + g, dim=-1, keepdim=True))
        else:
            g = limit(-torch.logsumexp(scores + f, dim=-2, keepdim=True))
    return (scores + f + g).exp()


def largest(plan, count):
    return plan >= plan.topk(count, dim=-1).values[..., -1:]


# What comes before the loop, or after it, stays in the graph.
CARRIED = {
    "clamp": lambda s: loop(s.clamp(-50, 50)),
    "clamp_above": lambda s: loop(s.clamp(max=30)),
    "clamp_of_the_kernel": lambda s: kernel_loop(s.exp().clamp_min(1e-12)),
    "cap": lambda s: loop(50 * torch.tanh(s / 50)),
    "wide_cap": lambda s: loop(1e3 * torch.tanh(s / 1e3)),
    "threshold": lambda s: loop(torch.where(s < -25, -1e9, s)),
    "huber": lambda s: loop(-F.smooth_l1_loss(s, torch.zeros_like(s), reduction="none", beta=100.0)),
    "temperature_of_large_scores": lambda s: loop(s / (1 + F.relu(s.abs().amax((-1, -2), keepdim=True) - 100))),
    "deviation_of_the_batch": lambda s: loop(s / s.std()),
    "largest_of_the_batch": lambda s: loop(s / s.abs().max()),
    "soft_gate": lambda s: loop(s * torch.sigmoid(s.amax((-1, -2), keepdim=True) + 40)),
    "threshold_of_the_plan": lambda s: F.threshold(loop(s), 1e-9, 0.0),
    "where_of_the_plan": lambda s: (lambda p: torch.where(p > 1e-9, p, 0.0))(loop(s)),
    "top_k_of_the_plan": lambda s: (lambda p: p * largest(p, QUERIES))(loop(s)),
    "power_of_the_plan": lambda s: loop(s) ** 1.0,
    "large_guard": lambda s: kernel_loop(s.exp(), lambda total: total.clamp_min(1e-3)),
    "guarded_power": lambda s: loop(s).clamp(min=1e-30) ** 1.0,
}
# Steps of the loop themselves, with a word of the line that is named.
REFUSED = {
    "clamp_of_vectors": (lambda s: vectors(s, lambda u: u.clamp(max=1e6)), "clamp"),
    "floor_of_vectors": (lambda s: vectors(s, lambda u: u.clamp_min(1e-9)), "clamp_min"),
    "clamp_of_potentials": (lambda s: potentials(s, lambda f: f.clamp(-80, 80)), "clamp"),
    "minimum_of_potentials": (lambda s: potentials(s, lambda f: torch.minimum(f, torch.tensor(90.0))), "minimum"),
    "cap_of_potentials": (lambda s: potentials(s, lambda f: 1e4 * torch.tanh(f / 1e4)), "tanh"),
    "threshold_in_the_loop": (lambda s: potentials(s, lambda f: torch.where(f > 70, 70.0, f)), "gt"),
    "large_vectors": (lambda s: vectors(s, lambda u: torch.where(u > 1e8, 1e8, u)), "gt"),
    "limit_behind_a_zero": (lambda s: potentials(s, lambda f: torch.where(f - 60 > 0, 60.0, f)), "gt"),
    "clamp_by_an_absolute_value": (lambda s: potentials(s, lambda f: (f + 60 - (f - 60).abs()) / 2), "abs"),
    "clamp_by_a_root": (lambda s: potentials(s, lambda f: (f + 60 - (f - 60).square().sqrt()) / 2), "square"),
    "clamp_by_a_least": (
        lambda s: potentials(s, lambda f: torch.stack([f, torch.full_like(f, 60.0)]).amin(0)),
        "amin",
    ),
    "soft_clamp": (lambda s: potentials(s, lambda f: -torch.logaddexp(-f, torch.tensor(-60.0))), "logaddexp"),
    "guard_from_above": (lambda s: kernel_loop(s.exp(), lambda total: total.clamp(1e-9, 1e9)), "clamp"),
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_stands_before_or_after_a_loop_is_carried_at_any_scale(name):
    torch.manual_seed(0)
    module = Attention(CARRIED[name]).double().eval()
    x = torch.randn(5, QUERIES, 16, dtype=torch.float64)
    graph = CapturedGraph(export(module, {"x": x[:2]}), Samples({"x": x[:2]}))
    [site] = find_sinkhorn(graph, Samples({"x": x[:3]})).sites
    assert (site.loop.half_steps, site.loop.last) == (STEPS, "rows")
    operators = {site.name: exact_operator(site, wide=True)}
    changed = RewriteSinkhorn([site], operators)(graph.program.module()).program
    for scale in SCALES:
        for part in (x, x[3:], x[4:]):  # in other company, and alone
            inputs = {"x": scale**0.5 * part}
            assert worst(outputs(changed, inputs), outputs(module, inputs)) < 1e-6, (name, scale, len(part))


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_is_none_of_a_loop_is_named(name):
    plan, word = REFUSED[name]
    torch.manual_seed(0)
    findings = find(Attention(plan))
    assert findings.sites == ()
    assert any(miss.reason.startswith(f"{word} at ") for miss in findings.misses), findings.misses


def between(steps, change):
    """A loop on a kernel that does something else before each half-step."""

    def plan(scores):
        kernel = scores.exp()
        for axis in AXES[:steps]:
            kernel = change(kernel)
            kernel = kernel / kernel.sum(dim=DIMS[axis], keepdim=True)
        return kernel

    return plan


# Made of the steps of loops, and analytic: they act on far larger scores than those of the samples.
HIDDEN = {
    "soft_clamp_by_hand": lambda s: potentials(s, lambda f: f - (1 + (f - 60).exp()).log()),
    "soft_clamp_by_softmax": lambda s: potentials(
        s, lambda f: f * torch.stack([torch.full_like(f, 60.0), f]).softmax(0)[0]
    ),
    "saturating_vectors": lambda s: vectors(s, lambda u: u / (1 + 1e-20 * u)),
    "constants_in_the_kernel": between(4, lambda kernel: kernel + 1e-12),
    "tiny_constants_in_the_kernel": between(4, lambda kernel: kernel + 1e-20),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_acts_on_far_larger_scores_only_is_no_loop(name):
    torch.manual_seed(0)
    assert find(Attention(HIDDEN[name])).sites == ()


@pytest.mark.parametrize(
    "guard",
    [
        lambda total: total + 1e-8,
        lambda total: 1e-8 + total,
        lambda total: total.clamp_min(1e-9),
        lambda total: total.clamp(min=1e-9),
        lambda total: torch.maximum(total, torch.tensor(1e-9)),
    ],
)
def test_constants_that_keep_divisors_from_zero_belong_to_the_loop(guard):
    [site] = find(Attention(lambda s: kernel_loop((4 * (s - s.amax(-1, keepdim=True))).exp(), guard))).sites
    assert (site.loop.half_steps, site.loop.last) == (STEPS, "rows")
    assert site.loop.guard is not None
    assert 1 <= site.loop.reach < 30  # at thirty times these scores, sums of columns are as small


def test_a_loop_without_such_constants_reaches_any_scores():
    [site] = find(Attention(loop)).sites
    assert site.loop.reach == math.inf


class FromTheBatch(Attention):
    """A temperature, or a marginal, that a loop takes from all samples together."""

    def __init__(self, plan):
        super().__init__(None)
        self.of_batch = plan

    def forward(self, x):
        q, k, v = (self.heads(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        return (self.of_batch(q @ k.mT, x) @ v).transpose(1, 2).flatten(2)


def annealed(scores, x):
    f, g = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[..., :1, :])
    epsilon = x.std()
    for _ in range(STEPS // 2):
        g = -epsilon * torch.logsumexp((scores + f) / epsilon, dim=-2, keepdim=True)
        f = -epsilon * torch.logsumexp((scores + g) / epsilon, dim=-1, keepdim=True)
    return ((scores + f + g) / epsilon).exp()


def marginals_of_the_batch(scores, x):
    mass = QUERIES * x.mean(dim=(0, 2)).softmax(dim=-1)
    plan = scores
    for axis in AXES:
        plan = plan - torch.logsumexp(plan, dim=DIMS[axis], keepdim=True)
        plan = plan + mass.log() if axis == "columns" else plan
    return plan.exp()


def later_samples_otherwise(scores, x):
    place = torch.arange(x.shape[0])[:, None, None, None]
    for axis in AXES:
        scores = scores - scores.logsumexp(DIMS[axis], keepdim=True) * torch.where(place > 2, 0.9, 1.0)
    return scores.exp()


def of_the_number(count):
    """Damped by the number of samples, which is 3 where the finder looks."""

    def plan(scores, x):
        for axis in AXES:
            scores = scores - scores.logsumexp(DIMS[axis], keepdim=True) * count(scores, x) / 3
        return scores.exp()

    return plan


NUMBERS = [
    lambda s, x: torch.ones_like(x[:, 0, 0]).sum(),
    lambda s, x: torch.ones(x.shape[0]).sum(),
    lambda s, x: torch.full_like(s[:1, :1, :1, :1], x.shape[0]),
    lambda s, x: torch.scalar_tensor(x.shape[0]),
]


@pytest.mark.parametrize(
    "plan", [marginals_of_the_batch, annealed, later_samples_otherwise, *map(of_the_number, NUMBERS)]
)
def test_a_loop_that_reads_the_batch_is_no_site(plan):
    torch.manual_seed(0)
    assert find(FromTheBatch(plan)).sites == ()


@pytest.mark.parametrize("statistic", [torch.std, lambda x: x.abs().max(), lambda x: x.mean((0, 1)).exp().mean()])
def test_a_temperature_of_the_batch_comes_in_with_the_scores(statistic):
    torch.manual_seed(0)
    module = FromTheBatch(lambda scores, x: loop(scores / statistic(x))).double().eval()
    x = torch.randn(5, QUERIES, 16, dtype=torch.float64)
    graph = CapturedGraph(export(module, {"x": x[:2]}), Samples({"x": x[:2]}))
    [site] = find_sinkhorn(graph, Samples({"x": x[:3]})).sites
    changed = RewriteSinkhorn([site], {site.name: exact_operator(site, wide=True)})(graph.program.module()).program
    for part in (x, x[3:], x[4:], x.flip(0)):
        assert worst(outputs(changed, {"x": part}), outputs(module, {"x": part})) < 1e-6


@pytest.mark.parametrize(("half_steps", "last"), [(202, "rows"), slow(401, "columns")])
def test_long_loops_are_counted_though_they_have_converged(half_steps, last):
    torch.manual_seed(0)
    [site] = find(Attention(lambda s: log_domain(s, order(half_steps, last)))).sites
    assert (site.loop.half_steps, site.loop.last) == (half_steps, last)


def slowly_annealed(scores, steps=60):
    f, g = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[..., :1, :])
    for i in range(steps):
        epsilon = max(1.0, 4.0 * 0.8**i)
        g = -epsilon * torch.logsumexp((scores + f) / epsilon, dim=-2, keepdim=True)
        f = -epsilon * torch.logsumexp((scores + g) / epsilon, dim=-1, keepdim=True)
    return (scores + f + g).exp()


def over_relaxed(scores, steps=60):
    f, g = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[..., :1, :])
    for i in range(steps):
        omega = 1.5 if i < 20 else 1.0
        g = (1 - omega) * g - omega * torch.logsumexp(scores + f, dim=-2, keepdim=True)
        f = (1 - omega) * f - omega * torch.logsumexp(scores + g, dim=-1, keepdim=True)
    return (scores + f + g).exp()


def by_head(scores):
    return torch.cat([log_domain(scores[:, :1], order(120, "rows")), log_domain(scores[:, 1:], order(100, "rows"))], 1)


def frozen(scores, steps=40):
    plan = scores
    for _ in range(steps):
        after = log_domain(plan, ["columns"]).log().log_softmax(dim=-1)
        done = (after - plan).abs().amax(dim=(-1, -2), keepdim=True) < 1e-6
        plan = torch.where(done, plan, after)
    return plan.exp()


@pytest.mark.parametrize(
    "plan", slow_beyond([slowly_annealed, over_relaxed, by_head, frozen]), ids=lambda plan: plan.__name__
)
def test_other_loops_that_converge_to_the_same_are_told_apart(plan):
    torch.manual_seed(0)
    assert find(Attention(plan)).sites == ()


def test_a_plan_whose_smallest_entries_underflow_is_recognised():
    torch.manual_seed(0)
    module = Attention(loop, epsilon=1e-3).double()
    [site] = find(module, x=torch.randn(3, QUERIES, 16, dtype=torch.float64)).sites
    assert (site.loop.half_steps, site.loop.masked) == (STEPS, False)
    assert site.epsilon == pytest.approx([1e-3, 1e-3], rel=1e-6)


class ByKind(Attention):
    """Queries of one kind get less mass than others: the mask of kinds is none of padding."""

    def forward(self, x, kind):
        q, k, v = (self.heads(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        scores = q @ k.mT
        for axis in AXES:
            scores = scores.log_softmax(dim=DIMS[axis])
            scores = torch.where(kind[:, None, :, None], scores, scores - 0.7) if axis == "rows" else scores
        return (scores.exp() @ v).transpose(1, 2).flatten(2)


def test_a_mask_that_is_the_same_in_all_samples_tells_nothing():
    kind = (torch.arange(QUERIES) < 2).expand(3, -1).clone()
    findings = find(ByKind(None), x=torch.randn(3, QUERIES, 16), kind=kind)
    assert findings.sites == ()
    assert any("kind" in miss.reason for miss in findings.misses)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Attention(None)

    def forward(self, x, mask):
        a = self.inner
        q, k, v = (a.heads(layer(x)) for layer in (a.to_q, a.to_k, a.to_v))
        plan = (q @ k.mT).masked_fill(~mask[:, None, None, :], -math.inf)
        for axis in AXES:
            total = plan.logsumexp(dim=DIMS[axis], keepdim=True)
            plan = plan - total.masked_fill(total == -math.inf, 0.0)
        return (plan.exp() @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("lengths", slow_beyond([(1, 6), (6, 1), (2, 1, 5), (1, 4)]))
def test_a_sample_of_length_one_does_not_hide_a_masked_loop(lengths):
    torch.manual_seed(0)
    mask = torch.arange(QUERIES) < torch.tensor(lengths)[:, None]
    [site] = find(Padded(), x=torch.randn(len(lengths), QUERIES, 16), mask=mask).sites
    assert (site.loop.half_steps, site.loop.masked) == (STEPS, True)


def test_the_line_of_what_is_no_step_is_shown():
    [miss] = find(Attention(lambda s: vectors(s, lambda u: u.clamp(max=1e6)))).misses
    assert "clamp" in miss.reason
    assert source_text(miss)
