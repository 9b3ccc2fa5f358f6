from math import inf, nan

import pytest
import torch
from helpers.fitted import cached_teacher, changed, sound
from helpers.tolerances import FLOAT64, difference

from asapc.ops.scaling import MAX_SPREAD
from asapc.planning.calibrate import BATCH
from asapc.planning.ranges import ScoreRange, deviation, limits, score_ranges, wide_sites
from asapc.types.samples import Samples


def test_the_deviation_is_that_of_what_is_not_masked():
    scores = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    assert difference(deviation(scores), scores.flatten(2).std(dim=-1, correction=0)) < FLOAT64
    masked = torch.cat([scores, torch.full((3, 2, 4, 2), -inf, dtype=torch.float64)], dim=-1)
    assert difference(deviation(masked), deviation(scores)) < FLOAT64
    assert deviation(torch.full((2, 1, 3, 3), -inf)).tolist() == [[0], [0]]


def test_each_sample_has_its_place_and_the_limits_hold_them_all():
    teacher = cached_teacher(sound)
    result = score_ranges(teacher.graph, [teacher.site], teacher.samples)[teacher.site.name]
    assert result.deviations.shape == (len(teacher.samples),)
    alone = score_ranges(teacher.graph, [teacher.site], teacher.samples[5:7])[teacher.site.name]
    assert difference(alone.deviations, result.deviations[5:7]) < FLOAT64
    low, high = limits({"a": result})["a"]
    assert 0 < low <= high
    assert low == result.deviations.min()
    assert result.kernel_spread <= MAX_SPREAD


def test_scores_far_apart_spread_the_kernel():
    teacher = cached_teacher(sound)
    old = teacher.site
    sharp = changed(old, score_scale=1e3 * old.wiring.product.score_scale, scale=1e3 * old.loop.scale)
    assert score_ranges(teacher.graph, [sharp], teacher.samples)[sharp.name].kernel_spread > MAX_SPREAD


def test_sites_are_wide_where_the_kernel_spreads_too_far_or_by_nan():
    spreads = {"narrow": MAX_SPREAD, "wide": 1.01 * MAX_SPREAD, "infinite": inf, "nan": nan}
    ranges = {name: ScoreRange(spread, torch.ones(1)) for name, spread in spreads.items()}
    assert wide_sites(ranges) == {"wide", "infinite", "nan"}


@pytest.mark.parametrize("sample", [0, BATCH])
def test_scores_of_nan_in_any_batch_make_a_site_wide(sample):
    teacher = cached_teacher(sound)
    images = teacher.samples.inputs["images"].clone()
    assert len(images) > BATCH
    images[sample] = nan
    ranges = score_ranges(teacher.graph, [teacher.site], Samples({"images": images}))
    assert wide_sites(ranges) == {teacher.site.name}
