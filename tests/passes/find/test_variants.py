"""Loops whose scores are more than q.k, and plans that are more than a factor of values."""

import math

import pytest
import torch
from helpers.attention import (
    AXIS,
    HEADS,
    QUERIES,
    WIDTH,
    Attention,
    division,
    find,
    log_domain,
    order,
    sinkhorn,
    source_text,
)
from helpers.tolerances import FLOAT32, FLOAT64, difference
from torch import nn


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
