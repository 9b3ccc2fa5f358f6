"""The zoo itself: every model does what its case says."""

import dataclasses

import pytest
import torch
from helpers.zoo import NEGATIVES, POSITIVES, Expected
from helpers.zoo.reference import sinkhorn

CASES = POSITIVES + NEGATIVES
BATCH_WIDE = {"over_the_batch"}  # the batch is an axis of its plan


def build(case):
    torch.manual_seed(0)
    return case.build().eval()


def inputs(case, batch=3, seed=1):
    return case.inputs(batch, torch.Generator().manual_seed(seed))


def outputs(module, arguments):
    with torch.no_grad():
        result = module(*(value.clone() for value in arguments.values()))
    return result if isinstance(result, tuple) else (result,)


def references(case, module, sites, arguments):
    with torch.no_grad():
        result = case.reference(module, sites, **arguments)
    return result if isinstance(result, tuple) else (result,)


def difference(results, others):
    """The largest relative error of any output."""
    pairs = zip(results, others, strict=True)
    return max((torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item() for a, b in pairs)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def never_stopping(case, module):
    """The module with its early stops off."""
    for part in module.modules() if case.early_stop else ():
        if hasattr(part, "tol"):
            part.tol = 0.0
    return module


def misdeclared(site):
    """The declarations next to this one."""
    other = {"rows": "columns", "columns": "rows"}[site.last]
    for half_steps, last in [(-2, site.last), (-1, other), (0, other), (1, other), (2, site.last)]:
        if site.half_steps + half_steps > 0:
            yield dataclasses.replace(site, half_steps=site.half_steps + half_steps, last=last)


@by_name(POSITIVES)
def test_a_loop_is_the_declared_one_and_no_other(case, float64):
    module, arguments = never_stopping(case, build(case)), inputs(case)
    actual = outputs(module, arguments)
    assert difference(actual, references(case, module, case.sites, arguments)) < case.tolerance
    for i, site in enumerate(case.sites):
        for wrong in misdeclared(site):
            sites = (*case.sites[:i], wrong, *case.sites[i + 1 :])
            assert difference(actual, references(case, module, sites, arguments)) > 10 * case.tolerance, wrong


@by_name([case for case in NEGATIVES if hasattr(getattr(case.build(), "attention", None), "plan")])
def test_no_loop_of_two_half_steps_or_more_gives_the_plan_of_a_negative(case, float64):
    scores = 2.5 * torch.randn(2, 2, 16, 16)
    plan = build(case).attention.plan(scores.clone())
    for half_steps in range(2, 41):
        for last in ("rows", "columns"):
            other = sinkhorn(scores, Expected(half_steps, last, None))
            factor = plan.sum() / other.sum()  # plans that differ by a factor are of one loop
            assert difference((plan,), (factor * other,)) > 1e-3


@by_name(CASES)
def test_outputs_are_finite_and_vary_with_the_input(case):
    module = build(case)
    first, second = outputs(module, inputs(case)), outputs(module, inputs(case, seed=2))
    assert all(result.isfinite().all() for result in first)
    assert difference(first, second) > 0.1


@by_name([case for case in CASES if not case.early_stop and case.name not in BATCH_WIDE])
def test_samples_do_not_see_each_other(case):
    module, arguments = build(case), inputs(case)
    alone = outputs(module, {name: value[:2] for name, value in arguments.items()})
    together = tuple(result[:2] for result in outputs(module, arguments))
    assert difference(alone, together) < 1e-4


@by_name([case for case in POSITIVES if case.early_stop])
def test_loose_tolerances_stop_the_loop_for_some_inputs_and_tight_ones_for_none(case):
    module, full = build(case), never_stopping(case, build(case))
    stopped = []
    for seed in range(10):
        arguments = inputs(case, batch=1, seed=seed)
        stopped.append(difference(outputs(module, arguments), outputs(full, arguments)) > 0)
    loose = module.attention.tol > 1e-6
    assert any(stopped) == loose
    assert not all(stopped)


def test_names_are_taken_once():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def test_positives_have_sites_and_negatives_have_reasons():
    assert all(case.sites and case.reference for case in POSITIVES)
    assert all(case.reason and not case.sites for case in NEGATIVES)
