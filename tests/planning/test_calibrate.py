import weakref
from dataclasses import replace
from math import inf

import pytest
import torch
from helpers.fitted import DIM, HEADS, SCALE, TOKENS, cached_teacher, site, sound
from helpers.points import activations, correlated_points, normal, scores_of
from helpers.tolerances import FLOAT32, FLOAT64, SOLVE, difference

from asapc.commands.study import study_module
from asapc.ops.c_transform import column_step, row_step
from asapc.ops.features import dual_features, project
from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual, sliced_dual_plan_ref, target_dual
from asapc.planning.bases import balanced_bases
from asapc.planning.calibrate import FitKey, calibrate, regressions, thin, thin_masses
from asapc.planning.hinges import count_places
from asapc.types.choices import SIDES, FeatureSet, SlicedDualParams
from asapc.types.samples import Samples

NO_KNOTS = torch.zeros(HEADS, 0, 0, dtype=torch.float64)
KEY = FitKey("attention", FeatureSet())


def unfitted(queries, keys, slices=2):
    bases = balanced_bases([site()], iter([activations(queries, keys)]))["attention"]
    return SlicedDualParams(*bases, slices, NO_KNOTS)


def batches(queries, keys, *sizes):
    parts = zip(queries.split(sizes), keys.split(sizes), strict=True)
    return iter([activations(*part) for part in parts])


def test_statistics_do_not_depend_on_how_the_samples_are_split_into_batches():
    queries, keys = correlated_points(0), correlated_points(10)
    whole = balanced_bases([site()], batches(queries, keys, 4))["attention"]
    parts = balanced_bases([site()], batches(queries, keys, 1, 3))["attention"]
    params = {KEY: unfitted(queries, keys)}
    at_once = regressions([site()], params, batches(queries, keys, 4))[KEY]
    streamed = regressions([site()], params, batches(queries, keys, 3, 1))[KEY]
    assert difference(torch.stack(parts), torch.stack(whole)) < SOLVE
    assert difference(streamed.gram, at_once.gram) < FLOAT64
    assert difference(streamed.moment, at_once.moment) < FLOAT64
    assert difference(streamed.energy, at_once.energy) < FLOAT64
    counted = [count_places([site()], {"attention": whole}, batches(queries, keys, *sizes)) for sizes in ((4,), (1, 3))]
    assert all(torch.equal(counted[0]["attention", side], counted[1]["attention", side]) for side in SIDES)
    assert streamed.count == at_once.count == 4 * TOKENS


def features_of(params, queries, keys):
    """Features of the keys."""
    return dual_features(project(keys, params.key_basis), project(queries, params.query_basis), params.slices, NO_KNOTS)


def centred(vectors):
    return vectors - vectors.mean(dim=-1, keepdim=True)


@pytest.mark.parametrize("half_steps", [4, 5, 8])
def test_the_regression_target_is_the_dual_from_which_the_operator_meets_the_teacher(half_steps):
    queries, keys = correlated_points(0), correlated_points(10)
    params = unfitted(queries, keys)
    problem = regressions([site(half_steps)], {KEY: params}, batches(queries, keys, 4))[KEY]
    target = centred(target_dual(scores_of(queries, keys, SCALE), half_steps, "keys", "rows"))
    features = centred(features_of(params, queries, keys))
    assert difference(problem.gram, torch.einsum("bhfn,bhen->hfe", features, features)) < FLOAT64
    assert difference(problem.moment, torch.einsum("bhfn,bhn->hf", features, target)) < FLOAT64
    assert difference(problem.energy, target.square().sum(dim=(0, 2))) < FLOAT64


@pytest.mark.parametrize("last", ["rows", "columns"])
def test_the_queries_dual_is_the_keys_with_queries_and_keys_exchanged(last):
    queries, keys = correlated_points(0), correlated_points(10, tokens=7)
    bases = balanced_bases([site()], iter([activations(queries, keys)]))["attention"]
    exchanged = {"rows": "columns", "columns": "rows"}[last]
    one = {KEY: SlicedDualParams(*bases, 2, NO_KNOTS)}
    other = {KEY: SlicedDualParams(*bases[::-1], 2, NO_KNOTS, side="queries")}
    actual = regressions([site(last=exchanged, queries=7)], other, batches(keys, queries, 4))[KEY]
    expected = regressions([site(last=last)], one, batches(queries, keys, 4))[KEY]
    assert difference(actual.gram, expected.gram) < FLOAT64
    assert difference(actual.moment, expected.moment) < FLOAT64


def test_a_later_map_is_fitted_on_the_closures_of_the_maps_before_it():
    queries, keys = correlated_points(0) / 3, correlated_points(10) / 3
    params = unfitted(queries, keys)
    weights = torch.ones(HEADS, params.slices + DIM + 1, dtype=torch.float64) / 10
    problem = regressions([site()], {KEY: replace(params, weights=(weights,))}, batches(queries, keys, 4))[KEY]
    scores = scores_of(queries, keys, SCALE)
    estimate = torch.einsum("hf,bhfn->bhn", weights, features_of(params, queries, keys))
    closed = centred(column_step(scores, row_step(scores, estimate)))
    assert problem.gram.shape == (HEADS, params.slices + DIM + 2, params.slices + DIM + 2)
    assert difference(problem.gram[:, -1, -1], closed.square().sum(dim=(0, 2))) < FLOAT64


def padded(points, more):
    """The points with padding appended, whatever that holds."""
    return torch.cat([points, 100 * normal(3, *points.shape[:2], more, DIM)], dim=-2)


@pytest.mark.parametrize("step", [0, 1])
def test_a_masked_site_is_fitted_on_what_is_live_alone(step):
    queries, keys = correlated_points(0) / 3, correlated_points(10) / 3
    plain, masked = site(), site(queries=TOKENS + 2, keys=TOKENS + 4, masked=True)
    more_queries, more_keys = padded(queries, 2), padded(keys, 4)
    scores = scores_of(more_queries, more_keys, SCALE)
    scores[..., TOKENS:, :] = -inf
    scores[..., TOKENS:] = -inf
    batch = {"attention": (scores, more_queries, more_keys)}
    bases = balanced_bases([plain], iter([activations(queries, keys)]))["attention"]
    with_padding = balanced_bases([masked], iter([batch]))["attention"]
    assert difference(torch.stack(with_padding), torch.stack(bases)) < SOLVE
    weights = (torch.ones(HEADS, DIM + 1, dtype=torch.float64) / 10,) * step
    params = {KEY: SlicedDualParams(*bases, 0, NO_KNOTS, weights)}
    expected = regressions([plain], params, iter([activations(queries, keys)]))[KEY]
    actual = regressions([masked], params, iter([batch]))[KEY]
    place = [{"attention": bases}]
    one, other = (
        count_places([s], *place, iter([b])) for s, b in ((plain, activations(queries, keys)), (masked, batch))
    )
    assert all(difference(one["attention", side], other["attention", side]) < FLOAT64 for side in SIDES)
    assert actual.count == expected.count == 4 * TOKENS
    assert difference(actual.gram, expected.gram) < FLOAT64
    assert difference(actual.moment, expected.moment) < FLOAT64


def dead_query_axes(qkv):
    qkv.weight[:5], qkv.bias[:5] = 0, 0.1


def dead_key_axes(qkv):
    qkv.weight[32:37], qkv.bias[32:37] = 0, 0.1


def keys_of_rank_one(qkv):
    """All key axes of the first head repeat the first one."""
    qkv.weight[32:48], qkv.bias[32:48] = qkv.weight[32:33].clone(), 0


@pytest.fixture
def teacher():
    return cached_teacher(sound)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("slices", "pieces", "paired"), [(0, 0, False), (4, 0, False), (0, 4, False), (0, 0, True), (2, 3, True)]
)
def test_the_fitted_operator_is_closer_to_the_teacher_than_truncated_sinkhorn_of_as_many_half_steps(
    teacher, slices, pieces, paired, side
):
    fitted = teacher.calibrate(slices, 2, pieces, side, paired)
    errors = []
    for steps in range(3):
        operator = SlicedDual(replace(fitted, weights=fitted.weights[: 1 + steps]))
        errors.append(teacher.error(operator))
        assert errors[-1] < 0.5 * teacher.error(Sinkhorn(operator.half_steps))
    # Every closure step brings it closer.
    assert errors == sorted(errors, reverse=True)


def test_the_first_maps_do_not_depend_on_how_many_come_after_them(teacher):
    one, three = teacher.calibrate(closure_steps=0), teacher.calibrate(closure_steps=2)
    assert len(one.weights) == 1
    assert len(three.weights) == 3
    assert torch.equal(one.weights[0], three.weights[0])


def test_fitted_parameters_are_float32_and_have_no_more_slices_than_the_head_has_axes(teacher):
    params = teacher.calibrate(slices=1000)
    assert params.slices == teacher.site.head_dim
    assert [w.shape for w in params.weights] == [(2, 2 * teacher.site.head_dim + 1)]
    tensors = (params.query_basis, params.key_basis, *params.weights)
    assert {t.dtype for t in tensors} == {torch.float32}


def test_a_line_of_progress_comes_before_every_pass_over_the_samples(teacher):
    lines = []
    sets = {teacher.site.name: [FeatureSet(2, 0), FeatureSet(0, 4)]}
    calibrate(teacher.graph, sets, [teacher.site], teacher.samples, teacher.samples, 2, lines.append)
    assert len(lines) == 5


@pytest.mark.parametrize("change", [dead_query_axes, dead_key_axes, keys_of_rank_one])
def test_degenerate_heads_are_fitted_as_well_as_sound_ones(change):
    teacher = cached_teacher(change)
    fitted = teacher.calibrate()
    assert all(torch.isfinite(weights).all() for weights in fitted.weights)
    assert teacher.error(SlicedDual(fitted)) < 0.5 * teacher.error(Sinkhorn(3))


@pytest.mark.parametrize("change", [sound, dead_query_axes, dead_key_axes, keys_of_rank_one])
def test_a_fit_gives_in_float32_what_it_gives_in_float64(change):
    # A fit that leans on features smaller than the rounding of float32 would not.
    teacher = cached_teacher(change)
    fitted = teacher.calibrate(closure_steps=1)
    scores, queries, keys, values = teacher.inputs
    expected = sliced_dual_plan_ref(scores, queries, keys, fitted) @ values.double()
    assert difference(SlicedDual(fitted)(*teacher.inputs), expected) < FLOAT32


def test_a_long_site_is_fitted_on_some_of_its_points(teacher, monkeypatch):
    whole = teacher.calibrate()
    monkeypatch.setattr("asapc.planning.calibrate.MAX_POINTS", 12)  # of 16
    points = normal(0, 4, HEADS, 16, DIM), normal(1, 4, HEADS, 11, DIM)
    scores, queries, keys = thin(activations(*points)["attention"])
    assert scores.shape == (4, HEADS, 12, 11)
    assert difference(scores, scores_of(queries, keys, SCALE)) < FLOAT64
    part = teacher.calibrate()
    assert not torch.equal(part.weights[0], whole.weights[0])
    assert teacher.error(SlicedDual(part)) < 0.5 * teacher.error(Sinkhorn(3))


def test_points_that_are_left_out_take_their_masses_with_them(monkeypatch):
    rows = torch.arange(1.0, TOKENS + 1).double()
    weighted = site(row_mass=rows)
    keys = torch.zeros(1, 1, TOKENS, 1)
    for most in (TOKENS, 4):
        monkeypatch.setattr("asapc.planning.calibrate.MAX_POINTS", most)
        _, queries, _ = thin((torch.zeros(1, 1, TOKENS, TOKENS), rows.view(1, 1, TOKENS, 1), keys))
        of_rows, of_columns = thin_masses(weighted.loop)
        assert torch.equal(of_rows, queries.flatten())
        assert of_columns is None


@pytest.mark.parametrize("side", SIDES)
def test_closures_of_a_site_of_marginals_of_its_own_lead_to_its_own_dual(side):
    """From a map that is right, two half-steps of the loop later."""
    queries, keys = correlated_points(0) / 3, correlated_points(10) / 3
    masses = {"row_mass": normal(20, TOKENS).exp(), "column_mass": normal(21, TOKENS).exp()}
    weighted, params = site(**masses), replace(unfitted(queries, keys), side=side)
    weights = torch.zeros(HEADS, params.slices + DIM + 1, dtype=torch.float64)
    problem = regressions([weighted], {KEY: replace(params, weights=(weights,))}, batches(queries, keys, 4))[KEY]
    f, g = masses["row_mass"].log(), masses["column_mass"].log()  # what an estimate of 0 stands for
    scores = scores_of(queries, keys, SCALE)
    if side == "keys":
        f = row_step(scores, g.expand(4, HEADS, -1), masses["row_mass"])
        closed = centred(column_step(scores, f, torch.ones(1)))
    else:
        g = column_step(scores, f.expand(4, HEADS, -1), masses["column_mass"])
        closed = centred(row_step(scores, g, torch.ones(1)))
    assert difference(problem.gram[:, -1, -1], closed.square().sum(dim=(0, 2))) < FLOAT64


class Pivots(torch.nn.Module):
    """Attention by way of a few points: the values of one plan are what the other gives."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(6, 8) for _ in range(3))
        self.pivots = torch.nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        pivots = self.pivots.expand(x.shape[0], -1, -1)
        return self.plan(self.q(x) @ pivots.mT) @ (self.plan(pivots @ self.k(x).mT) @ self.v(x))

    def plan(self, scores):
        for dim in (-2, -1, -2, -1):
            scores = scores.log_softmax(dim=dim)
        return scores.exp()


def test_a_site_may_read_what_another_gives():
    torch.manual_seed(0)
    samples = Samples({"x": torch.randn(12, 7, 6)})
    teacher = study_module(Pivots(), samples)
    assert len(teacher.sites) == 2
    features = FeatureSet()
    fitted = calibrate(
        teacher.graph,
        {s.name: [features] for s in teacher.sites},
        teacher.sites,
        samples[:8],
        samples[8:],
        closure_steps=0,
    )
    assert {fit.site for fit in fitted} == {s.name for s in teacher.sites}


def test_each_map_says_what_more_samples_would_do_unless_half_of_them_cannot_be_told(teacher, monkeypatch):
    monkeypatch.setattr("asapc.planning.calibrate.BATCH", 8)
    params = teacher.calibrate(closure_steps=2)
    assert len(params.doubling) == 3
    assert all(0 <= share < 1 for share in params.doubling)
    monkeypatch.setattr("asapc.planning.calibrate.BATCH", len(teacher.samples))
    assert teacher.calibrate(closure_steps=2).doubling == ()


def test_statistics_of_batches_are_not_kept_beside_their_sum(monkeypatch):
    """They would take more memory than the samples."""

    class Statistics(dict):
        """A dict that can be referred to weakly."""

    alive = []

    def batches_of(*arguments):
        for _ in range(5):
            statistics = Statistics()
            alive.append(weakref.ref(statistics))
            yield statistics
            del statistics
            assert sum(reference() is not None for reference in alive) <= 1

    monkeypatch.setattr("asapc.planning.calibrate.running", batches_of)
    assert regressions([], {}, iter([])) == {}
    assert len(alive) == 5
