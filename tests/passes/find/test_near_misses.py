"""What must not be taken for Sinkhorn attention that asapc can compile, with a word of the reason."""

import inspect
import math
from pathlib import Path

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

from asapc.commands.inspect import require_sites
from asapc.errors import NoSinkhornError


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


class Matcher(nn.Module):
    """Returns what becomes of its scores; no product reads it."""

    def __init__(self, normalise):
        super().__init__()
        self.normalise, self.to_q = normalise, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.normalise(self.to_q(x) @ x.mT)


def with_flaw(flaw, turns=4):
    """A log-domain loop that does something else in its second turn."""

    def log_plan(scores):
        for turn in range(turns):
            scores = scores.log_softmax(-1)
            scores = (flaw(scores) if turn == 1 else scores).log_softmax(-2)
        return scores

    return log_plan


def sharpened(scores):
    return 1.5 * scores


def noisy(scores):
    return scores + torch.eye(QUERIES)


def by_roots(scores):
    plan = scores.exp()
    for _ in range(4):
        plan = plan / (plan.sum(-1, keepdim=True) * plan.sum(-2, keepdim=True)).sqrt()
    return plan


def by_powers(scores):
    kernel = scores.exp()
    v = torch.ones_like(kernel[..., :1])
    for _ in range(4):
        u = (kernel @ v) ** -0.9
        v = 1 / (kernel.mT @ u)
    return u * kernel * v.mT


def turned(scores):
    for _ in range(4):
        scores = sharpened(scores.log_softmax(-1)).mT
    return scores.exp()


def second_by(divide):
    """Two half-steps, of which the second goes wrong."""

    def plan(scores):
        rows = scores.softmax(-1)
        return divide(rows, rows.sum(-2, keepdim=True))

    return plan


def headline(module):
    torch.manual_seed(0)
    [name] = inspect.signature(module.forward).parameters
    findings = find(module, **{name: torch.randn(3, QUERIES, WIDTH)})
    with pytest.raises(NoSinkhornError) as caught:
        require_sites(findings, Path("model.pt"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Matcher(lambda s: with_flaw(sharpened)(s).exp()), "half-steps"),
        (Matcher(with_flaw(sharpened)), "half-steps"),
        (Matcher(with_flaw(noisy)), "multiple of the scores"),
        (Matcher(lambda s: with_flaw(sharpened)(s).exp() - 1 / QUERIES), "half-steps"),
        (Matcher(by_roots), "sqrt at"),
        (Matcher(by_powers), "pow at"),
        (Matcher(turned), "half-steps"),
        (Matcher(second_by(lambda rows, sums: rows / sums.sqrt())), "sqrt at"),
        (Matcher(second_by(lambda rows, sums: rows / sums**2)), "pow at"),
        (Matcher(second_by(lambda rows, sums: rows * sums)), "half-steps"),
        (nn.Sequential(Attention(softmax), Matcher(with_flaw(noisy))), "multiple of the scores"),
        (
            nn.Sequential(
                Attention(lambda s: s.clamp(-99, 99).softmax(-1)),
                Attention(lambda s: with_flaw(sharpened)(s).exp()),
                Attention(softmax),
            ),
            "half-steps",
        ),
    ],
    ids=[
        "plan",
        "log_plan",
        "clamp",
        "less_constant",
        "roots",
        "powers",
        "turned",
        "second_by_roots",
        "second_by_squares",
        "second_by_sums",
        "softmax_before",
        "between_softmax",
    ],
)
def test_the_headline_is_the_nearest_miss_whatever_reads_the_plan(module, reason):
    assert reason in headline(module)


@pytest.mark.parametrize(
    "normalise",
    [
        softmax,
        lambda s: s.log_softmax(-1),
        lambda s: (s - s.mean(1, keepdim=True)) / s.norm(dim=-1, keepdim=True),
        lambda s: (s - s.mean(-1, keepdim=True)) / s.var(-1, keepdim=True),
        lambda s: s.softmax(-1) * s.softmax(-2),
        lambda s: s.softmax(-1) / s.softmax(-1).sum(-1, keepdim=True) ** 2,
    ],
    ids=["softmax", "log_softmax", "centred", "layer_norm", "both_softmaxes", "rows_twice"],
)
def test_what_is_returned_and_normalised_in_another_way_is_not_even_missed(normalise):
    assert find(Matcher(normalise)).misses == ()
