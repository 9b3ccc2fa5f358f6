"""Encoders of every kind of attention: padding takes no part, and asapc finds their Sinkhorn loops as they are."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers.tolerances import FLOAT32, FLOAT64, difference
from torch import Tensor, nn

from asapc.capturing.capture import capture_code
from asapc.commands.study import study_module
from asapc.loading.model import load_model
from asapc.models.blocks import Attention
from asapc.models.matching import Matcher
from asapc.models.pointset import PointTransformer
from asapc.models.sinkhorn import FORMS, sinkhorn
from asapc.models.text import TextTransformer
from asapc.models.vit import VisionTransformer
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import build
from asapc.types.choices import Candidate
from asapc.types.samples import Samples

SMALL = {"width": 16, "depth": 1, "heads": 2, "epsilon": 0.5, "iterations": 2}
LENGTH = 10


class Encoder(NamedTuple):
    """A model, its arguments, and what draws its inputs, as many samples as asked for, each with its mask."""

    kind: Callable[..., nn.Module]
    args: dict
    inputs: dict[str, Callable[[int], Tensor]]


def points(size: int = LENGTH) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, size, 3)


def tokens(count: int) -> Tensor:
    return torch.randint(50, (count, LENGTH))


ENCODERS = {
    "points": Encoder(PointTransformer, {}, {"points": points()}),
    "points, induced": Encoder(PointTransformer, {"inducing": 4}, {"points": points()}),
    "text": Encoder(TextTransformer, {"vocabulary": 50, "length": LENGTH}, {"tokens": tokens}),
    "matching": Encoder(Matcher, {}, {"source": points(), "target": points(LENGTH + 2)}),
}
every_encoder = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
classifiers = pytest.mark.parametrize("name", ["points", "points, induced", "text"])
every_attention = pytest.mark.parametrize("attention", ["softmax", "sinkhorn", "sliced", "one_pass"])


def small(encoder: Encoder, **changes) -> nn.Module:
    return encoder.kind(**{**SMALL, **encoder.args, **changes}).eval()


def draw(encoder: Encoder, count: int) -> dict[str, Tensor]:
    return {name: inputs(count) for name, inputs in encoder.inputs.items()}


def draw_masks(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A mask for each input, with padding anywhere and something real in each sample."""
    masks = {name: torch.rand(value.shape[:2]) < 0.6 for name, value in inputs.items()}
    for mask in masks.values():
        mask[:, 3] = True
        mask[:, 4] = False
    return {"mask" if len(masks) == 1 else f"{name}_mask": mask for name, mask in masks.items()}


def loss(outputs: Tensor) -> Tensor:
    return outputs.square().sum()


@every_encoder
@every_attention
def test_a_padded_batch_is_each_sample_alone_in_outputs_and_gradients(encoder: Encoder, attention: str) -> None:
    model = small(encoder, attention=attention).double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in draw(encoder, 3).items()}
    masks = draw_masks(inputs)
    outputs = model(**inputs, **masks)
    gradients = torch.autograd.grad(loss(outputs), list(model.parameters()), allow_unused=True)
    totals = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for sample in range(3):
        real = [mask[sample] for mask in masks.values()]
        alone = model(*(v[sample : sample + 1, keep] for v, keep in zip(inputs.values(), real, strict=True)))
        own = outputs[sample : sample + 1]
        if encoder.kind is Matcher:
            assert own[:, ~real[0]].count_nonzero() + own[:, :, ~real[1]].count_nonzero() == 0
            own = own[:, real[0]][:, :, real[1]]
        assert difference(own, alone) < FLOAT64
        of_sample = torch.autograd.grad(loss(alone), list(model.parameters()), allow_unused=True)
        totals = [total if g is None else total + g for total, g in zip(totals, of_sample, strict=True)]
    scale = max(total.norm() for total in totals)
    for gradient, total in zip(gradients, totals, strict=True):
        assert gradient is None or (gradient - total).norm() < FLOAT64 * scale


def test_pixels_that_are_masked_take_no_part() -> None:
    model = VisionTransformer(size=4, **SMALL).eval()
    images, mask = torch.rand(3, 4, 4), torch.rand(3, 4, 4) < 0.6
    noise = torch.where(mask, images, torch.rand(3, 4, 4)).requires_grad_()
    outputs = model(images, mask)
    torch.testing.assert_close(model(noise, mask), outputs)
    (gradient,) = torch.autograd.grad(loss(model(noise, mask)), noise)
    assert gradient[~mask].count_nonzero() == 0
    assert gradient[mask].count_nonzero() == mask.sum()
    assert difference(model(images), outputs) > 0.01


@classifiers
def test_a_sample_that_is_nothing_but_padding_spoils_no_training(name: str) -> None:
    model, inputs = small(ENCODERS[name]), draw(ENCODERS[name], 3)
    masks = draw_masks(inputs)
    masks["mask"][1] = False
    outputs = model(**inputs, **masks)
    assert bool(outputs.isfinite().all())
    for gradient in torch.autograd.grad(loss(outputs), list(model.parameters()), allow_unused=True):
        assert gradient is None or bool(gradient.isfinite().all())


@every_encoder
def test_outputs_do_not_depend_on_the_rest_of_the_batch(encoder: Encoder) -> None:
    model, inputs = small(encoder), draw(encoder, 5)
    with torch.no_grad():
        outputs, alone = model(**inputs), model(**{name: value[2:3] for name, value in inputs.items()})
    assert difference(outputs[2:3], alone) <= FLOAT32


@every_encoder
def test_plans_are_doubly_stochastic(encoder: Encoder, monkeypatch) -> None:
    plans = []
    monkeypatch.setitem(FORMS, "log", lambda *args: plans.append(sinkhorn(*args)) or plans[-1])
    with torch.no_grad():
        small(encoder, epsilon=1.0, iterations=40)(**draw(encoder, 2))
    assert plans
    for plan in plans:
        n, m = plan.shape[-2:]
        torch.testing.assert_close(plan.sum(dim=-1), torch.ones(plan.shape[:-1]))
        sums = torch.full_like(plan[..., 0, :], n / m)
        torch.testing.assert_close(plan.sum(dim=-2), sums, rtol=1e-2, atol=1e-2)


def test_the_order_of_points_does_not_matter() -> None:
    for name in ("points", "points, induced"):
        model, samples = small(ENCODERS[name]), torch.randn(2, 24, 3)
        with torch.no_grad():
            logits, shuffled = model(samples), model(samples[:, torch.randperm(24)])
        assert difference(shuffled, logits) < FLOAT32


def test_a_context_of_the_tokens_themselves_is_self_attention() -> None:
    attention, x = Attention(16, 2), torch.randn(2, 7, 16)
    torch.testing.assert_close(attention(x, x), attention(x))
    _, _, v = attention.points(x)
    mixed = (attention.plan(x) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(mixed))


# Sites, as (queries, keys, whether masked), in the order of the graph.
INDUCED = [(4, LENGTH), (LENGTH, 4)]
MATCHED = [(10, 10), (12, 12), (10, 12), (12, 10), (10, 12)]
SITES = [
    pytest.param("points, induced", False, INDUCED, id="induced"),
    pytest.param("points, induced", True, INDUCED, id="induced, masked"),
    pytest.param("text", True, [(LENGTH, LENGTH)], id="text, masked"),
    pytest.param("matching", True, MATCHED, id="matching, masked"),
]


@pytest.mark.parametrize(("name", "masked", "sizes"), SITES)
def test_every_loop_is_found_as_it_is_written_and_replaced_exactly(name: str, masked: bool, sizes: list) -> None:
    model, inputs = small(ENCODERS[name]), draw(ENCODERS[name], 6)
    samples = Samples(inputs | (draw_masks(inputs) if masked else {}))
    teacher = study_module(model, samples)
    loops = [site.loop for site in teacher.sites]
    assert [(loop.queries, loop.keys) for loop in loops] == sizes
    for site in teacher.sites:
        assert (site.loop.half_steps, site.loop.last, site.loop.masked) == (4, "rows", masked)
        assert list(site.epsilon) == pytest.approx([SMALL["epsilon"]] * site.loop.heads, rel=1e-3)
    exact = {site.name: build(site, Candidate("exact", site.loop.half_steps, 0.0)) for site in teacher.sites}
    compiled = RewriteSinkhorn(teacher.sites, exact)(teacher.graph.program.module()).program
    with torch.no_grad():
        assert difference(compiled(*samples.inputs.values()), model(**samples.inputs)) < FLOAT32


@pytest.mark.parametrize("name", ["points", "text"])
def test_a_checkpoint_loads_and_its_loop_is_recognised(name: str, tmp_path) -> None:
    encoder = ENCODERS[name]
    args = {**SMALL, **encoder.args}
    model = encoder.kind(**args)
    checkpoint = {
        "format": "asapc.checkpoint/1",
        "model": f"{type(model).__module__}:{type(model).__name__}",
        "model_args": args,
        "state_dict": model.state_dict(),
        "calibration": {"inputs": draw(encoder, 4)},
    }
    torch.save(checkpoint, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    (site,) = find_sinkhorn(capture_code(loaded, loaded.calibration), loaded.calibration).sites
    assert (site.name, site.loop.half_steps, site.loop.last) == ("blocks.0.attention", 4, "rows")
    assert site.epsilon == pytest.approx((0.5, 0.5), rel=1e-3)
