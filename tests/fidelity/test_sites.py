"""How close operators come to their loops, alone."""

from math import inf, isnan, nan
from pathlib import Path

import pytest
import torch
from helpers.tolerances import FLOAT32

from asapc.capturing.capture import capture_code
from asapc.capturing.export import export
from asapc.fidelity.sites import candidate_fidelity, site_fidelity
from asapc.models.vit import VisionTransformer
from asapc.ops.sinkhorn import Sinkhorn
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.planning.operators import exact_operator
from asapc.types.graph import CapturedGraph
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples


@pytest.fixture(scope="module")
def teacher():
    """A small Sinkhorn model as a graph, its one site, and samples."""
    torch.manual_seed(0)
    model = VisionTransformer(size=4, classes=3, width=8, depth=1, heads=2, iterations=10).eval()
    samples = Samples({"images": torch.rand(6, 4, 4)})
    loaded = LoadedModel(model, Path("model.pt"), "0" * 64, 0, samples, samples)
    graph = capture_code(loaded, samples)
    return graph, find_sinkhorn(graph, samples[:2]).sites, samples


def test_the_exact_operator_costs_nothing_but_rounding(teacher):
    graph, (site,), samples = teacher
    result = site_fidelity(graph, [site], {site.name: exact_operator(site)}, samples)[site.name]
    assert result.relc < FLOAT32
    assert result.plan_tv < FLOAT32
    assert result.row_marginal_error < FLOAT32


def test_softmax_in_the_place_of_sinkhorn_shows_in_every_number_but_the_rows(teacher):
    graph, (site,), samples = teacher
    softmax = Sinkhorn(1)
    exact = site_fidelity(graph, [site], {site.name: exact_operator(site)}, samples)[site.name]
    result = site_fidelity(graph, [site], {site.name: softmax}, samples)[site.name]
    for name in ("relc", "plan_tv", "column_marginal_error"):
        assert getattr(result, name) > 10 * getattr(exact, name)
    assert result.row_marginal_error < FLOAT32


class Copies(torch.nn.Module):
    """Sinkhorn over values that are all the same, as the streams of hyper-connections are at the first layer."""

    def forward(self, scores):
        plan = scores.exp()
        for _ in range(40):
            plan = plan / plan.sum(-1, keepdim=True)
            plan = plan / plan.sum(-2, keepdim=True)
        return plan @ torch.ones_like(scores) * 0.7


def test_rounding_is_no_error_where_all_rows_are_given_the_same():
    samples = Samples({"scores": torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))})
    graph = capture_code(LoadedModel(Copies(), Path("model.pt"), "0" * 64, 0, samples, samples), samples)
    (site,) = find_sinkhorn(graph, samples[:2]).sites
    results = candidate_fidelity(graph, [site], {site.name: {n: exact_operator(site, n) for n in (80, 2)}}, samples)
    assert results[site.name][80].relc == 0
    assert results[site.name][2].relc > 1  # what is off is more than rows differ by


class Zero(torch.nn.Module):
    """An operator whose plan is all zero, so that every error of a site is known."""

    def forward(self, scores, queries, keys, values=None) -> torch.Tensor:
        return torch.zeros_like(scores) if values is None else torch.zeros(*queries.shape[:-1], values.shape[-1])


def test_an_operator_without_mass_has_errors_that_are_known(teacher):
    graph, (site,), samples = teacher
    result = site_fidelity(graph, [site], {site.name: Zero()}, samples)[site.name]
    assert result.row_marginal_error == pytest.approx(1)
    assert result.column_marginal_error == pytest.approx(1)
    assert result.plan_tv == pytest.approx(0.5)  # half of the plan's mass, which is 1 a row
    assert result.relc >= 1  # the teacher's output over itself without its mean


class NotANumber(Zero):
    """An operator that is broken altogether."""

    def forward(self, scores, queries, keys, values=None) -> torch.Tensor:
        return super().forward(scores, queries, keys, values) * nan


def test_an_operator_that_returns_nan_has_no_finite_error(teacher):
    graph, (site,), samples = teacher
    result = site_fidelity(graph, [site], {site.name: NotANumber()}, samples)[site.name]
    assert isnan(result.relc) or result.relc == inf


def test_sites_without_an_operator_are_left_out(teacher):
    graph, sites, samples = teacher
    assert site_fidelity(graph, sites, {}, samples) == {}


def test_the_size_of_the_batches_does_not_change_the_answer(teacher):
    graph, (site,), samples = teacher
    operator = {site.name: Sinkhorn(2)}
    many = Samples({"images": samples.inputs["images"].repeat(11, 1, 1)})  # 66 samples: several batches
    few = site_fidelity(graph, [site], operator, samples)[site.name]
    again = site_fidelity(graph, [site], operator, many)[site.name]
    assert again.relc == pytest.approx(few.relc, rel=FLOAT32)


class Padded(torch.nn.Module):
    """Sinkhorn attention that leaves padded keys out."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, live):
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        scores = (4 * q @ k.mT).masked_fill(~live[:, None, None, :], -inf)
        for i in range(7):
            sums = torch.logsumexp(scores, dim=-1 - i % 2, keepdim=True)
            scores = scores - sums.where(sums > -inf, 0.0)
        return scores.exp() @ v


@pytest.fixture(scope="module")
def padded():
    """A masked site, and samples of several lengths."""
    torch.manual_seed(0)
    lengths = torch.tensor([6, 3, 5, 1, 4, 6])
    samples = Samples({"x": torch.randn(6, 6, 8), "live": torch.arange(6) < lengths.unsqueeze(-1)})
    graph = CapturedGraph(export(Padded().eval(), samples[:2].inputs), samples[:2])
    [site] = find_sinkhorn(graph, samples[:3]).sites
    assert (site.loop.half_steps, site.loop.last, site.loop.masked) == (7, "rows", True)
    return graph, site, samples


def test_the_exact_operator_of_a_masked_site_costs_nothing_but_rounding(padded):
    graph, site, samples = padded
    result = site_fidelity(graph, [site], {site.name: exact_operator(site)}, samples)[site.name]
    assert max(result.relc, result.plan_tv, result.row_marginal_error) < FLOAT32
    # The teacher's own columns: half-steps that end on rows leave them off.
    reference = site_fidelity(graph, [site], {site.name: Sinkhorn(301, masked=True)}, samples)[site.name]
    assert reference.column_marginal_error < min(FLOAT32, result.column_marginal_error)


def test_an_operator_that_does_not_see_the_mask_is_found_out(padded):
    graph, site, samples = padded
    softmax = site_fidelity(graph, [site], {site.name: Sinkhorn(1, masked=True)}, samples)[site.name]
    assert softmax.row_marginal_error < FLOAT32
    assert min(softmax.relc, softmax.plan_tv, softmax.column_marginal_error) > 0.01

    class Unmasked(torch.nn.Module):
        def forward(self, scores, queries, keys, values=None):
            return Sinkhorn(7)(queries @ keys.mT, values=values)

    assert site_fidelity(graph, [site], {site.name: Unmasked()}, samples)[site.name].relc > 0.1


def test_a_sample_without_any_live_key_is_left_out_of_the_fidelity(padded):
    graph, site, samples = padded
    operator = {site.name: Sinkhorn(3, masked=True)}
    before = site_fidelity(graph, [site], operator, samples)[site.name]
    empty = Samples({"x": torch.randn(1, 6, 8), "live": torch.zeros(1, 6, dtype=torch.bool)})
    more = Samples({name: torch.cat([value, empty.inputs[name]]) for name, value in samples.inputs.items()})
    after = site_fidelity(graph, [site], operator, more)[site.name]
    for name in ("relc", "plan_tv", "row_marginal_error", "column_marginal_error"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=FLOAT32, abs=FLOAT32)


def test_a_plan_whose_logarithm_is_the_answer_is_compared_as_a_plan():
    class Matching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            scores = 4 * self.to_q(x) @ self.to_k(x).mT
            for i in range(6):
                scores = scores.log_softmax(dim=-1 - i % 2)
            return scores

    samples = Samples({"x": torch.randn(4, 5, 8)})
    graph = CapturedGraph(export(Matching().eval(), samples[:2].inputs), samples[:2])
    [site] = find_sinkhorn(graph, samples[:2]).sites
    assert (site.wiring.logarithm, site.loop.last, site.wiring.applied) == (True, "columns", False)
    result = site_fidelity(graph, [site], {site.name: exact_operator(site)}, samples)[site.name]
    assert max(result.relc, result.plan_tv, result.column_marginal_error) < FLOAT32
    fewer = site_fidelity(graph, [site], {site.name: exact_operator(site, 2)}, samples)[site.name]
    assert min(fewer.relc, fewer.plan_tv) > 0.01
