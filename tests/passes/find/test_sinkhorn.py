import linecache
import math

import pytest
import torch
from helpers.tolerances import FLOAT32, FLOAT64, difference
from torch import nn

from asapc.capturing.export import export
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples

WIDTH, HEADS, QUERIES, KEYS = 16, 2, 6, 9
AXIS = {"rows": -1, "columns": -2}


def order(half_steps, last):
    """The axes of the half-steps, in order."""
    other = {"rows": "columns", "columns": "rows"}[last]
    return [last if (half_steps - i) % 2 else other for i in range(half_steps)]


def log_domain(scores, axes):
    log_plan = scores
    for axis in axes:
        log_plan = log_plan - torch.logsumexp(log_plan, dim=AXIS[axis], keepdim=True)
    return log_plan.exp()


def log_softmax(scores, axes):
    for axis in axes:
        scores = scores.log_softmax(dim=AXIS[axis])
    return scores.exp()


def division(scores, axes):
    plan = torch.exp(scores - scores.amax(dim=(-1, -2), keepdim=True))
    for axis in axes:
        plan = plan / plan.sum(dim=AXIS[axis], keepdim=True)
    return plan


def division_in_place(scores, axes):
    plan = scores.exp_()
    for axis in axes:
        plan /= plan.sum(dim=AXIS[axis], keepdim=True)
    return plan


def scaling_vectors(scores, axes):
    kernel = scores.exp()
    u, v = torch.ones_like(scores[..., :1]), torch.ones_like(scores[..., :1, :])
    for axis in axes:
        if axis == "rows":
            u = 1 / (kernel * v).sum(dim=-1, keepdim=True)
        else:
            v = 1 / (kernel * u).sum(dim=-2, keepdim=True)
    return u * kernel * v


def potentials(scores, axes):
    """Sinkformers' way: costs, potentials updated by what is missing, uniform marginals, then times n."""
    n, m = scores.shape[-2:]
    cost = -scores
    u, v = torch.zeros_like(cost[..., 0]), torch.zeros_like(cost[..., 0, :])
    for axis in axes:
        log_plan = -cost + u.unsqueeze(-1) + v.unsqueeze(-2)
        if axis == "rows":
            u = math.log(1 / n) - torch.logsumexp(log_plan, dim=-1) + u
        else:
            v = math.log(1 / m) - torch.logsumexp(log_plan, dim=-2) + v
    return n * torch.exp(-cost + u.unsqueeze(-1) + v.unsqueeze(-2))


STYLES = [log_domain, log_softmax, division, division_in_place, scaling_vectors, potentials]


class Attention(nn.Module):
    """Attention whose plan is `normalise(scores / epsilon)`; of x to itself, or of x to a context."""

    def __init__(self, normalise, epsilon=0.5, returns_plan=False):
        super().__init__()
        self.normalise, self.epsilon, self.returns_plan = normalise, epsilon, returns_plan
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def heads(self, x):
        return x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)

    def scaled(self, scores):
        return scores / math.sqrt(WIDTH // HEADS) / self.epsilon

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.heads(self.to_q(x)), self.heads(self.to_k(context)), self.heads(self.to_v(context))
        plan = self.normalise(self.scaled(q @ k.transpose(-1, -2)))
        output = (plan @ v).transpose(1, 2).flatten(2)
        return (output, plan) if self.returns_plan else output


def find(module, **inputs):
    samples = Samples(inputs or {"x": torch.randn(3, QUERIES, WIDTH)})
    return find_sinkhorn(CapturedGraph(export(module.eval(), samples[:2].inputs), samples[:2]), samples)


def sinkhorn(style, half_steps, last):
    return lambda scores: style(scores, order(half_steps, last))


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
@pytest.mark.parametrize(("half_steps", "last"), [(2, "rows"), (3, "columns"), (5, "rows"), (10, "columns")])
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


@pytest.mark.parametrize("half_steps", [2, 3, 4, 7, 20, 21, 40])
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
        made = self.normalise(self.scaled(q @ k.transpose(-1, -2)))
        plan = self.drop(made)
        return plan @ v, plan


def test_a_plan_is_named_after_where_it_is_made_and_not_after_modules_of_torch_that_pass_it_on():
    module = nn.Sequential(DropsAndReturnsPlan(sinkhorn(log_domain, 5, "rows")))
    [site] = find(module, input=torch.randn(3, QUERIES, WIDTH)).sites
    assert site.name == "0"
    assert "made = self.normalise" in source_text(site)


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


# Loops whose scores are more than q.k.


def biased(scores):
    bias = torch.arange(QUERIES**2).view(QUERIES, QUERIES).float().cos()
    return log_domain(scores + bias, order(6, "rows"))


def sigmoid_in_a_sinkhorn_loop(scores):
    return division(scores.sigmoid(), order(6, "rows"))


def test_a_loop_over_scores_with_a_bias_starts_after_it_and_still_knows_its_product():
    findings = find(Attention(biased))
    assert findings.misses == ()
    [site] = findings.sites
    assert (site.loop.half_steps, site.loop.last, site.wiring.scores_are_product, site.loop.masked) == (
        6,
        "rows",
        False,
        False,
    )
    assert site.wiring.scores.node != site.wiring.product.query.node
    assert site.epsilon == pytest.approx([0.5, 0.5], rel=FLOAT64)


def test_a_loop_over_something_else_than_a_product_has_no_queries_keys_or_temperature():
    [site] = find(Attention(sigmoid_in_a_sinkhorn_loop)).sites
    assert (site.loop.half_steps, site.loop.last) == (6, "rows")
    assert site.wiring.product is site.epsilon is site.head_dim is None
    assert not site.wiring.scores_are_product
    assert site.wiring.attention is not None


class PaddedKeys(Attention):
    """Attention whose mask keeps keys out of the loop."""

    def __init__(self, normalise, mask):
        super().__init__(normalise)
        self.mask = mask

    def forward(self, x, live):
        q, k, v = self.heads(self.to_q(x)), self.heads(self.to_k(x)), self.heads(self.to_v(x))
        scores = self.scaled(q @ k.transpose(-1, -2))
        plan = self.normalise(scores.masked_fill(~live[:, None, None, :], self.mask))
        return (plan @ v).transpose(1, 2).flatten(2)


def lengths(*live):
    return torch.arange(QUERIES) < torch.tensor(live).unsqueeze(-1)


def log_domain_of_live_columns(scores, axes):
    for axis in axes:
        sums = torch.logsumexp(scores, dim=AXIS[axis], keepdim=True)
        scores = scores - sums.where(sums > -1e3, 0.0)
    return scores.exp()


@pytest.mark.parametrize("mask", [-math.inf, -1e4])
@pytest.mark.parametrize(("half_steps", "last"), [(4, "rows"), (7, "rows"), (6, "columns")])
def test_padded_keys_make_a_masked_site(mask, half_steps, last):
    module = PaddedKeys(sinkhorn(log_domain_of_live_columns, half_steps, last), mask)
    [site] = find(module, x=torch.randn(3, QUERIES, WIDTH), live=lengths(3, 6, 4)).sites
    assert (site.loop.half_steps, site.loop.last, site.loop.masked) == (half_steps, last, True)
    assert site.epsilon == pytest.approx([0.5, 0.5], rel=FLOAT64)


@pytest.mark.parametrize("last", ["rows", "columns"])
def test_masses_that_differ_from_one_another_are_read_off(last):
    rows, columns = torch.linspace(0.5, 1.5, QUERIES).double(), torch.linspace(2, 1, QUERIES).double()
    columns = columns * rows.sum() / columns.sum()

    def weighted(scores):
        log_plan = scores
        for axis in order(6, last):
            mass = rows.float()[:, None] if axis == "rows" else columns.float()
            log_plan = log_plan - torch.logsumexp(log_plan, dim=AXIS[axis], keepdim=True) + mass.log()
        return log_plan.exp()

    [site] = find(Attention(weighted)).sites
    assert (site.loop.half_steps, site.loop.last, site.loop.uniform) == (6, last, False)
    assert difference(site.loop.row_mass / site.loop.row_mass.sum(), rows / rows.sum()) < FLOAT32
    assert difference(site.loop.column_mass / site.loop.column_mass.sum(), columns / columns.sum()) < FLOAT32
    final, mass = (site.loop.row_mass, rows) if last == "rows" else (site.loop.column_mass, columns)
    assert difference(final, mass) < FLOAT32


class OneHead(Attention):
    def heads(self, x):
        return x


class LearnedQueries(Attention):
    """A few learned queries for all samples attend to the tokens; written with einsum, or with matmul."""

    def __init__(self, normalise, einsum):
        super().__init__(normalise)
        self.queries, self.einsum = nn.Parameter(torch.randn(1, HEADS, 4, WIDTH // HEADS)), einsum

    def forward(self, x):
        k, v = self.heads(self.to_k(x)), self.heads(self.to_v(x))
        if self.einsum:
            scores = torch.einsum("bhnd,bhmd->bhnm", self.queries, k)
        else:
            scores = self.queries @ k.transpose(-1, -2)
        return self.normalise(self.scaled(scores)) @ v


@pytest.mark.parametrize("einsum", [True, False])
def test_queries_that_all_samples_share_have_no_sample_axis(einsum):
    [site] = find(LearnedQueries(sinkhorn(log_domain, 6, "rows"), einsum)).sites
    assert (site.loop.half_steps, site.loop.last, site.loop.queries, site.loop.keys) == (6, "rows", 4, QUERIES)
    assert "b" not in site.wiring.product.query.axes
    assert "b" in site.wiring.product.key.axes


def test_scores_without_a_head_axis_make_one_head():
    [site] = find(OneHead(sinkhorn(log_domain, 5, "rows"))).sites
    assert (site.loop.heads, site.head_dim, site.wiring.scores.axes, site.wiring.attention.output.axes) == (
        1,
        WIDTH,
        "bnm",
        "bne",
    )


def test_the_plan_of_a_site_that_is_also_returned_is_what_is_replaced():
    findings = find(Attention(sinkhorn(log_domain, 5, "rows"), returns_plan=True))
    assert findings.misses == ()
    [site] = findings.sites
    assert (site.loop.half_steps, site.loop.last, site.wiring.applied) == (5, "rows", True)
    assert site.wiring.attention is None
    assert "self.normalise" in source_text(site)


class Matching(Attention):
    """No values: the plan, or its logarithm, is the answer."""

    def forward(self, x):
        q, k = self.heads(self.to_q(x)), self.heads(self.to_k(x))
        return self.normalise(self.scaled(q @ k.transpose(-1, -2)))


def log_plan(scores, axes):
    for axis in axes:
        scores = scores.log_softmax(dim=AXIS[axis])
    return scores


@pytest.mark.parametrize("style", [log_domain, log_plan])
def test_a_plan_that_is_the_answer_is_a_site_without_values(style):
    [site] = find(Matching(sinkhorn(style, 6, "columns"))).sites
    assert (site.loop.half_steps, site.loop.last, site.wiring.applied) == (6, "columns", False)
    assert site.wiring.logarithm is (style is log_plan)
    assert site.wiring.attention is None
    assert site.epsilon == pytest.approx([0.5, 0.5], rel=FLOAT64)


# What must not be taken for Sinkhorn attention that asapc can compile, with a word of the reason.


def softmax(scores):
    return scores.softmax(dim=-1)


def dual_softmax(scores):
    return scores.softmax(dim=-1) * scores.softmax(dim=-2)


def normalised_sigmoid(scores):
    plan = scores.sigmoid()
    return plan / plan.sum(dim=-1, keepdim=True)


def causal(scores):
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril()
    return log_domain(scores.masked_fill(~mask, -math.inf), order(1, "rows"))


def banded(scores):
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril(1).triu(-1)
    return log_domain(scores.masked_fill(~mask, -math.inf), order(6, "rows"))


def nothing(scores):
    return scores


def rows_only_and_over_again(scores):
    return division(scores, ["rows"] * 4)


def relaxed(scores):
    """Damped updates: rows and columns converge to the same plan, but by another road."""
    f, g = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[..., :1, :])
    for _ in range(3):
        g = 0.5 * g - 0.5 * torch.logsumexp(scores + f, dim=-2, keepdim=True)
        f = 0.5 * f - 0.5 * torch.logsumexp(scores + g, dim=-1, keepdim=True)
    return torch.exp(scores + f + g)


@pytest.mark.parametrize(
    ("normalise", "reason"),
    [
        (softmax, "softmax"),
        (rows_only_and_over_again, "softmax"),
        (dual_softmax, "half-steps"),
        (relaxed, "half-steps"),
        (normalised_sigmoid, "multiple of the scores"),
        (causal, "causal"),
        (banded, "not whole rows and columns"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_only_looks_like_sinkhorn_is_missed_with_reason_hint_and_source_line(normalise, reason):
    findings = find(Attention(normalise))
    assert findings.sites == ()
    [miss] = findings.misses
    assert reason in miss.reason
    assert miss.hint
    assert "plan @ v" in source_text(miss)


def test_a_matrix_with_negative_entries_is_no_plan_and_not_even_missed():
    findings = find(Attention(nothing))
    assert findings.sites == findings.misses == ()


def test_scores_that_are_constant_on_the_samples_are_missed():
    attention = Attention(sinkhorn(log_domain, 5, "rows"))
    nn.init.zeros_(attention.to_q.weight)
    nn.init.zeros_(attention.to_q.bias)
    [miss] = find(attention).misses
    assert "constant" in miss.reason


def test_a_sinkhorn_is_found_beside_a_softmax_that_is_not_one():
    module = nn.Sequential(Attention(softmax), Attention(sinkhorn(log_domain, 5, "rows")), Attention(softmax))
    findings = find(module, input=torch.randn(3, QUERIES, WIDTH))
    assert [site.name for site in findings.sites] == ["1"]
    [miss] = findings.misses  # of the same line of code, in both places
    assert "softmax" in miss.reason


def test_a_model_without_attention_has_neither_sites_nor_misses():
    findings = find(nn.Linear(WIDTH, WIDTH), input=torch.randn(3, QUERIES, WIDTH))
    assert findings.sites == findings.misses == ()


def source_text(found):
    """The line of code that a site or a miss points to."""
    file, line = found.source.rsplit(":", 1)
    return linecache.getline(file, int(line))
