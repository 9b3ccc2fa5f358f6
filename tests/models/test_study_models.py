import pytest
import torch
from helpers.tolerances import FLOAT32
from torch import nn

from asapc.capturing.capture import capture_code
from asapc.loading.model import load_model
from asapc.models.pointset import PointTransformer
from asapc.models.text import TextTransformer
from asapc.models.vit import sinkhorn
from asapc.passes.find.sinkhorn import find_sinkhorn

SMALL = {"width": 16, "depth": 1, "heads": 2}


def points(count: int) -> torch.Tensor:
    return torch.randn(count, 24, 3)


def tokens(count: int) -> torch.Tensor:
    return torch.randint(50, (count, 24))


MODELS = [
    pytest.param(PointTransformer, {}, "points", points, 10, id="points"),
    pytest.param(TextTransformer, {"vocabulary": 50, "length": 24}, "tokens", tokens, 2, id="text"),
]


@pytest.mark.parametrize(("model_class", "args", "name", "draw", "classes"), MODELS)
def test_logits_have_one_row_a_sample_and_do_not_depend_on_the_rest_of_the_batch(
    model_class: type[nn.Module], args, name, draw, classes
) -> None:
    model = model_class(**SMALL, **args, iterations=3).eval()
    samples = draw(5)
    with torch.no_grad():
        logits, alone = model(samples), model(samples[2:3])
    assert logits.shape == (5, classes)
    assert (logits[2:3] - alone).norm() <= FLOAT32 * alone.norm()


@pytest.mark.parametrize(("model_class", "args", "name", "draw", "classes"), MODELS)
def test_plans_are_doubly_stochastic(model_class, args, name, draw, classes, monkeypatch) -> None:
    plans = []
    monkeypatch.setattr("asapc.models.vit.sinkhorn", lambda s, t: plans.append(sinkhorn(s, t)) or plans[-1])
    with torch.no_grad():
        model_class(**SMALL, **args, epsilon=0.25, iterations=20)(draw(2))
    (plan,) = plans
    assert plan.shape == (2, 2, 24, 24)
    torch.testing.assert_close(plan.sum(dim=-1), torch.ones(2, 2, 24))
    torch.testing.assert_close(plan.sum(dim=-2), torch.ones(2, 2, 24), rtol=1e-2, atol=1e-2)  # T = 20, not the limit


def test_the_order_of_points_does_not_matter() -> None:
    model, samples = PointTransformer(**SMALL, iterations=3).eval(), points(2)
    with torch.no_grad():
        logits, shuffled = model(samples), model(samples[:, torch.randperm(24)])
    assert (logits - shuffled).norm() <= FLOAT32 * logits.norm()


@pytest.mark.parametrize(("model_class", "args", "name", "draw", "classes"), MODELS)
def test_a_checkpoint_loads_and_its_loop_is_recognised(model_class, args, name, draw, classes, tmp_path) -> None:
    args = {**SMALL, **args, "epsilon": 0.5, "iterations": 3}
    model = model_class(**args)
    checkpoint = {
        "format": "asapc.checkpoint/1",
        "model": f"{model_class.__module__}:{model_class.__name__}",
        "model_args": args,
        "state_dict": model.state_dict(),
        "calibration": {"inputs": {name: draw(4)}},
    }
    torch.save(checkpoint, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    (site,) = find_sinkhorn(capture_code(loaded, loaded.calibration), loaded.calibration).sites
    assert site.loop.half_steps == 6
    assert site.loop.last == "rows"
    assert site.epsilon == pytest.approx((0.5, 0.5), rel=1e-3)
