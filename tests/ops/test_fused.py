"""The fused forms of the operators against their float64 references: no scores, the same plan."""

import math

import pytest
import torch
from helpers.masses import masses_of
from helpers.tolerances import FLOAT32, FLOAT64, difference
from hypothesis import given, settings
from hypothesis import strategies as st

from asapc.ops.c_transform import column_step, row_step
from asapc.ops.fused import attend, attention, half_step
from asapc.ops.sinkhorn import Sinkhorn, sinkhorn_plan_ref

quick = settings(max_examples=60, deadline=None)
HEADS, DIM = 3, 4


@st.composite
def points(draw):
    """Queries and keys far from zero or near it, values, and a dual of the keys, float64."""
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    offset, scale = draw(st.floats(-5, 5)), draw(st.floats(0.1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    queries, keys = offset + scale * normal(2, HEADS, n, DIM), offset + normal(2, HEADS, m, DIM)
    return queries, keys, normal(2, HEADS, m, 5), 3 * normal(2, HEADS, 1, m)


@quick
@given(points(), st.sampled_from([torch.float64, torch.float32]))
def test_a_half_step_is_that_of_the_scores(case, dtype):
    queries, keys, values, dual = case
    limit = FLOAT64 if dtype == torch.float64 else FLOAT32
    scores = queries @ keys.transpose(-1, -2)
    tensors = [tensor.to(dtype) for tensor in case]
    expected = row_step(scores, dual.squeeze(-2)).unsqueeze(-2)
    # Where one score lies far above the mean of all, the share of the mean is none in float32.
    if (-expected - scores.mean(dim=-1).unsqueeze(-2) - dual.mean(dim=-1, keepdim=True)).amax() < 80:
        assert difference(half_step(tensors[0], tensors[1], tensors[3]), expected) < limit
        assert (
            difference(half_step(tensors[0], tensors[1], None), row_step(scores, 0 * dual.squeeze(-2)).unsqueeze(-2))
            < limit
        )
    plan = torch.softmax(scores + dual, dim=-1)
    assert difference(attend(tensors[0], tensors[1], tensors[3], tensors[2]), plan @ values) < limit


@quick
@given(points(), st.integers(0, 10**6), st.sampled_from([torch.float64, torch.float32]))
def test_masked_keys_have_no_part_in_it(case, seed, dtype):
    queries, keys, values, dual = case
    limit = FLOAT64 if dtype == torch.float64 else FLOAT32
    live = (torch.rand(2, 1, 1, keys.shape[-2], generator=torch.Generator().manual_seed(seed)) < 0.6).expand(dual.shape)
    live = live | (live.sum(dim=-1, keepdim=True) == 0)
    scores = (queries @ keys.transpose(-1, -2)).masked_fill(~live, -math.inf)
    tensors = [tensor.to(dtype) for tensor in (*case, live)]
    expected = row_step(scores, dual.squeeze(-2)).unsqueeze(-2)
    means = [(torch.where(live, x, 0).sum(dim=-1) / live.sum(dim=-1)).unsqueeze(-2) for x in (scores, dual)]
    if (-expected - means[0] - means[1]).amax() < 80:
        assert difference(half_step(tensors[0], tensors[1], tensors[3], tensors[4]), expected) < limit
    plan = torch.softmax(scores + dual, dim=-1)
    assert difference(attend(tensors[0], tensors[1], tensors[3], tensors[2], tensors[4]), plan @ values) < limit


@quick
@given(points(), st.integers(1, 6), st.integers(0, 10**6))
def test_a_loop_to_masses_of_their_own_equals_the_reference(case, half_steps, seed):
    queries, keys, values, _ = case
    scores = queries @ keys.transpose(-1, -2)
    if scores.abs().amax() < 30:  # beyond, see above
        masses = masses_of(scores, seed)
        expected = sinkhorn_plan_ref(scores, half_steps, **masses) @ values
        actual = Sinkhorn(half_steps, **masses, lowering="fused").from_points(queries, queries, keys, values)
        assert difference(actual, expected) < FLOAT64


@pytest.mark.parametrize("half_steps", [1, 2, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_masked_loop_equals_the_materialised_one_where_all_is_masked_too(half_steps, dtype):
    queries, keys, values = (torch.randn(3, HEADS, n, 8) for n in (6, 9, 9))
    live = (torch.arange(9) < torch.tensor([9, 4, 0])[:, None])[:, None, None].expand(-1, HEADS, -1, -1)
    scores = (queries @ keys.transpose(-1, -2)).masked_fill(~live, -1e9)
    expected = Sinkhorn(half_steps, masked=True)(scores.double(), None, None, values.double())
    assert (expected[2] == 0).all()
    points = [tensor.to(dtype) for tensor in (queries, queries, keys, values)]
    actual = Sinkhorn(half_steps, lowering="fused").from_points(*points, live.float())
    assert difference(actual, expected) < (FLOAT32 if dtype == torch.float32 else 3e-3)
    assert (actual[2] == 0).all()


def test_a_half_step_on_columns_exchanges_queries_and_keys():
    queries, keys, dual = (torch.randn(2, HEADS, n, 4, dtype=torch.float64) for n in (5, 7, 5))
    dual = dual[..., 0]
    expected = column_step(queries @ keys.transpose(-1, -2), dual, torch.ones(()))
    assert difference(half_step(keys, queries, dual.unsqueeze(-2)), expected.unsqueeze(-2)) < FLOAT64


def test_a_score_far_above_all_others_gives_a_finite_dual():
    queries, keys = torch.full((1, 1, 2, 4), 30.0), torch.zeros(1, 1, 8, 4)
    keys[..., 0, :] = 30.0  # one score of 3600, whose exponential no float holds
    dual = half_step(queries, keys, None)
    assert dual.isfinite().all()
    output = attend(queries, keys, half_step(keys, queries, dual), torch.randn(1, 1, 8, 3))
    assert output.isfinite().all()


@pytest.mark.parametrize("half_steps", [1, 2, 3, 8, 21])
@pytest.mark.parametrize("shape", [(6, 6), (5, 9)])
def test_a_fused_loop_equals_the_reference(half_steps, shape):
    queries, keys = (torch.randn(2, HEADS, n, 8) for n in shape)
    values = torch.randn(2, HEADS, shape[1], 5)
    expected = sinkhorn_plan_ref(queries @ keys.transpose(-1, -2) / math.sqrt(8), half_steps) @ values.double()
    actual = Sinkhorn(half_steps, lowering="fused").from_points(queries / math.sqrt(8), queries, keys, values)
    assert difference(actual, expected) < FLOAT32


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("half_steps", [1, 2, 9])
@pytest.mark.parametrize("fused", [False, True])
def test_half_precision_points_lose_no_more_than_their_own_rounding(dtype, most, half_steps, fused):
    queries, keys, values = (torch.randn(2, HEADS, 40, 16) for _ in range(3))
    scores = queries.double() @ keys.double().transpose(-1, -2)
    expected = sinkhorn_plan_ref(scores, half_steps) @ values.double()
    q, k, v = (points.to(dtype) for points in (queries, keys, values))
    operator = Sinkhorn(half_steps)
    actual = operator.from_points(q, q, k, v) if fused else operator((q @ k.transpose(-1, -2)).float(), q, k, v)
    assert actual.dtype == dtype
    assert difference(actual, expected) < most


def test_attention_has_the_gradients_of_its_formula():
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 5), (6, 5), (6, 7))
    operands = [torch.randn(2, 3, *size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]
    assert torch.autograd.gradcheck(attention, operands)
