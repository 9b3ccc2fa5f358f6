"""What must not be taken for Sinkhorn attention that asapc can compile, with a word of the reason."""

import math

import pytest
import torch
from helpers.attention import (
    QUERIES,
    WIDTH,
    Attention,
    division,
    find,
    log_domain,
    order,
    sinkhorn,
    softmax,
    source_text,
)
from torch import nn


def dual_softmax(scores):
    return scores.softmax(dim=-1) * scores.softmax(dim=-2)


def normalised_sigmoid(scores):
    plan = scores.sigmoid()
    return plan / plan.sum(dim=-1, keepdim=True)


def causal(scores):
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril()
    return log_domain(scores.masked_fill(~mask, -math.inf), order(1, "rows"))


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
