import numpy as np
import pytest
import torch
from helpers.tolerances import FLOAT64, RIDGE, difference

from asapc.planning.ridge import PENALTIES, fit, gain_of_doubling, residual, ridge
from asapc.types.choices import Regression


def regression(features, target):
    """Statistics of features (rows, H, F) and target (rows, H)."""
    gram = torch.einsum("nhf,nhe->hfe", features, features)
    moment = torch.einsum("nhf,nh->hf", features, target)
    return Regression(gram, moment, target.square().sum(dim=0), len(features))


def problem(rows=50, heads=3, features=4):
    """Features of different spread, and a target that they do not quite explain."""
    units = torch.tensor([1e-2, 1.0, 1.0, 10.0], dtype=torch.float64)[:features]
    x = torch.randn(rows, heads, features, dtype=torch.float64) * units
    y = (x / units).sum(dim=-1) + 0.5 * torch.randn(rows, heads, dtype=torch.float64)
    return x, y


def test_without_a_penalty_to_speak_of_it_is_least_squares_head_by_head():
    x, y = problem()
    weights = ridge(regression(x, y), 1e-10)
    for head in range(3):
        expected = np.linalg.lstsq(x[:, head].numpy(), y[:, head].numpy(), rcond=None)[0]
        assert difference(weights[head], torch.from_numpy(expected)) < RIDGE


@pytest.mark.parametrize("penalty", [1e-3, 0.1, 10.0])
def test_the_penalty_falls_on_standardised_weights(penalty):
    x, y = problem()
    spread = x.square().mean(dim=0).sqrt()
    weights = ridge(regression(x, y), penalty)
    for head in range(3):
        # Ridge is least squares with one more row a feature: sqrt(rows * penalty) * spread, target 0.
        extra = np.diag(np.sqrt(len(x) * penalty) * spread[head].numpy())
        rows = np.concatenate([x[:, head].numpy(), extra])
        expected = np.linalg.lstsq(rows, np.concatenate([y[:, head].numpy(), np.zeros(4)]), rcond=None)[0]
        assert difference(weights[head], torch.from_numpy(expected)) < FLOAT64


def test_the_unit_of_a_feature_does_not_change_the_fit():
    x, y = problem()
    unit = torch.tensor([1.0, 0.1, 30.0, 7.0], dtype=torch.float64)
    actual = ridge(regression(x * unit, y), 1e-3) * unit
    assert difference(actual, ridge(regression(x, y), 1e-3)) < FLOAT64


def test_a_feature_that_is_zero_gets_weight_zero_and_leaves_the_others():
    x, y = problem()
    with_zero = torch.cat([x, torch.zeros_like(x[..., :1])], dim=-1)
    weights = ridge(regression(with_zero, y), 1e-3)
    assert (weights[:, -1] == 0).all()
    assert difference(weights[:, :-1], ridge(regression(x, y), 1e-3)) < FLOAT64


def test_a_feature_that_varies_by_rounding_alone_gets_weight_zero():
    # Centring leaves rounding where a feature never varies: a spread of 1e-17, which standardised is noise of
    # size 1, and a weight of 1e15 on it would blow up the rounding of float32 at inference.
    x = torch.randn(8, 7, 1, 3, dtype=torch.float64)
    constant = torch.rand(8, 1, 1, 1, dtype=torch.float64).expand(-1, 7, -1, -1)
    features = torch.cat([x, constant], dim=-1)
    features = (features - features.mean(dim=1, keepdim=True)).flatten(0, 1)
    assert 0 < features[..., -1].abs().max() < 1e-15
    target = features[..., 0] + torch.randn(56, 1, dtype=torch.float64)
    assert (ridge(regression(features, target), 1e-3)[:, -1] == 0).all()


def test_equal_features_share_their_weight():
    x, y = problem()
    weights = ridge(regression(torch.cat([x, x[..., :1]], dim=-1), y), 1e-3)
    assert difference(weights[:, -1], weights[:, 0]) < RIDGE


def test_features_that_are_all_zero_get_weights_zero():
    x, y = problem()
    assert (ridge(regression(torch.zeros_like(x), y), 1e-3) == 0).all()


def test_the_residual_is_the_sum_of_squared_errors():
    x, y = problem()
    weights = torch.randn(3, 4, dtype=torch.float64)
    expected = (y - torch.einsum("nhf,hf->nh", x, weights)).square().sum(dim=0)
    assert difference(residual(regression(x, y), weights), expected) < FLOAT64


def test_each_head_gets_the_penalty_that_serves_other_samples_best():
    x, y = problem(rows=9)
    others_x, others_y = problem(rows=200)
    fitting, selection = regression(x, y), regression(others_x, others_y)
    weights = fit(fitting, selection)
    least = torch.stack([residual(selection, ridge(fitting, penalty)) for penalty in PENALTIES]).amin(dim=0)
    assert difference(residual(selection, weights), least) < FLOAT64


def gain(half, whole, others):
    return gain_of_doubling(half, whole, others, fit(whole, others))


def test_what_twice_as_many_samples_would_give_is_predicted():
    """On average over many problems, since one is noisy: the prediction from 20 and 40 samples against 80."""
    predicted, errors = [], []
    for seed in range(60):
        torch.manual_seed(seed)
        x, y = problem(rows=80)
        others = regression(*problem(rows=400))
        predicted.append(gain(regression(x[:20], y[:20]), regression(x[:40], y[:40]), others))
        errors.append([residual(others, fit(regression(x[:n], y[:n]), others)).sum().sqrt() for n in (40, 80)])
    few, many = torch.tensor(errors).mean(dim=0)
    assert 0.01 < 1 - many / few < 0.2
    assert sum(predicted) / len(predicted) == pytest.approx(1 - many / few, rel=0.5)


def test_where_samples_explain_all_more_would_give_nothing():
    x, _ = problem(rows=40)
    y = x.sum(dim=-1)
    assert 0 <= gain(regression(x[:20], y[:20]), regression(x, y), regression(x, y)) <= 1 - 0.5**0.5
