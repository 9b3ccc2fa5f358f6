"""Whatever the finder finds in random models is what it says: the exact operator in its place changes no output."""

from itertools import cycle

import pytest
import torch
from helpers.compositions import CHOICES, POISONS, Composed, Composition, consistent, inputs_of
from helpers.relowering import examined
from helpers.verdicts import drawn, judged

WRONG = 1e-4  # relative, float32: rounding of long loops stays below, another function does not
# Random models, true loops and near-misses in turn; `python -m benchmarks.recognition --fuzz` tries more.
JUDGED = range(200)


def examine(composition):
    torch.manual_seed(composition.seed)
    module = Composed(composition).eval()
    actual = inputs_of(composition, batch=2, seed=composition.seed + 1, padded=composition.padding_seen)
    fresh = (inputs_of(composition, batch, seed=1000 + batch) for batch in (5, 1))
    return examined(module, actual, *fresh)


@pytest.mark.parametrize("number", JUDGED)
def test_a_rewrite_changes_nothing_at_any_scale_and_in_any_company(number):
    composition = drawn(number)
    verdict = judged(composition)
    assert verdict.kind != "wrong", (composition, verdict)
    if composition.poison == "none":
        assert verdict.sites, (composition, verdict.reasons)


def test_every_poison_has_a_form():
    for poison in POISONS:
        composition = consistent(Composition(poison=poison))
        module, inputs = Composed(composition).eval(), inputs_of(composition, 2, 0)
        with torch.no_grad():
            assert module(**inputs).isfinite().all(), poison


def test_every_style_gives_the_same_plan():
    expected = None
    for style in CHOICES["style"]:
        composition = Composition(style=style, post="returned")
        torch.manual_seed(0)
        with torch.no_grad():
            _, plan = Composed(composition).eval()(**inputs_of(composition, 2, 0))
        expected = plan if expected is None else expected
        torch.testing.assert_close(plan, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", CHOICES["layout"])
def test_every_layout_gives_the_same_output(layout):
    heads = 1 if layout == "none" else 3
    results = []
    for other in ("bhnm", layout):
        composition = Composition(layout=other, heads=heads, cross=True, bias="pairs", epsilon="log_per_head")
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(Composed(composition).eval()(**inputs_of(composition, 2, 0)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


STYLES = ("vectors_sum", "vectors_matmul", "vectors_einsum")


@pytest.mark.parametrize(("style", "layout"), zip(cycle(STYLES), CHOICES["layout"]))
def test_plans_are_found_that_are_not_built(style, layout):
    heads = 1 if layout == "none" else 3
    built, unbuilt = (
        consistent(Composition(style=style, layout=layout, heads=heads, cross=True, mask="infinite", post=post))
        for post in ("plain", "on_values")
    )
    findings, difference = examine(unbuilt)
    assert [(site.loop.half_steps, site.loop.last) for site in findings.sites] == [(built.half_steps, built.last)]
    assert difference < WRONG
    results = []
    for composition in (built, unbuilt):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(Composed(composition).eval()(**inputs_of(composition, 2, 0)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mask", "style"), [("infinite", "subtract"), ("finite", "divide"), ("zeros", "vectors_sum")])
def test_a_mask_that_the_samples_do_not_show_is_not_dropped(mask, style):
    findings, difference = examine(Composition(mask=mask, style=style, padding_seen=False))
    assert difference < WRONG, findings.sites
