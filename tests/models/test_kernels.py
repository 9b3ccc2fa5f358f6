"""What holds for every kernel of attention: sums, padding, rectangles, gradients, and scores of any size."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers.tolerances import FLOAT64, difference
from torch import Tensor

from asapc.models.blocks import Attention
from asapc.models.blocks import kernel as kernel_of
from asapc.models.kernel import Kernel
from asapc.models.one_pass import OnePass
from asapc.models.sinkhorn import FORMS, Sinkhorn
from asapc.models.sliced import SlicedTransport
from asapc.models.softmax import Softmax

HEADS, SIZE = 2, 3


def one_pass(paired: bool = True, pieces: int = 3) -> OnePass:
    """One pass with any map, as after training."""
    layer = OnePass(HEADS, SIZE, 0.5, pieces=pieces, paired=paired)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return layer


KERNELS: dict[str, Callable[[], Kernel]] = {
    "softmax": Softmax,
    "sinkhorn, log": partial(Sinkhorn, 0.25, 7),
    "sinkhorn, scaling": partial(Sinkhorn, 0.25, 7, "scaling"),
    "sinkhorn, recompute": partial(Sinkhorn, 0.25, 7, "recompute"),
    "sliced": partial(SlicedTransport, 2, 0.1),
    "sliced, more than channels": partial(SlicedTransport, 4, 0.1),
    "one pass": one_pass,
    "one pass, parabolas": partial(one_pass, paired=False, pieces=1),
}
every_kernel = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
MASKS = pytest.mark.parametrize("sides", ["both", "queries", "keys"])


def points(b: int, n: int, m: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random queries, keys and values."""
    return [torch.randn(b, HEADS, size, SIZE, dtype=dtype) for size in (n, m, m)]


def masks(sides: str, b: int, n: int, m: int) -> tuple[Tensor | None, Tensor | None]:
    """Random masks, with padding anywhere and something real in each sample."""
    both = [torch.rand(b, size) < 0.6 for size in (n, m)]
    for mask in both:
        mask[:, 2] = True
        mask[:, 1] = False
    return (None if sides == "keys" else both[0], None if sides == "queries" else both[1])


def real(tensor: Tensor, mask: Tensor | None, sample: int) -> Tensor:
    """The real tokens of one sample."""
    one = tensor[sample : sample + 1]
    return one if mask is None else one[:, :, mask[sample]]


@every_kernel
@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1), (1, 1)])
def test_rows_of_the_plan_sum_to_one_and_outputs_are_its_product_with_the_values(make, n: int, m: int) -> None:
    kernel, (q, k, v) = make().double(), points(2, n, m)
    plan = kernel.plan(q, k)
    assert plan.shape == (2, HEADS, n, m)
    assert bool((plan >= 0).all())
    torch.testing.assert_close(plan.sum(dim=-1), torch.ones(2, HEADS, n, dtype=torch.float64))
    assert difference(kernel(q, k, v), plan @ v) < FLOAT64


@pytest.mark.parametrize(
    "make",
    [
        *(partial(Sinkhorn, 2.0, 60, form) for form in ("log", "scaling", "recompute")),
        partial(SlicedTransport, 3, 1e-12),
    ],
    ids=[*FORMS, "sliced"],
)
@pytest.mark.parametrize("sides", ["neither", "both", "queries", "keys"])
def test_columns_of_doubly_stochastic_plans_sum_to_queries_over_keys(make, sides: str) -> None:
    q, k, _ = points(3, 5, 8)
    query_mask, key_mask = (None, None) if sides == "neither" else masks(sides, 3, 5, 8)
    plan = make().plan(q, k, query_mask, key_mask)
    live = torch.ones(3, 8, dtype=torch.bool) if key_mask is None else key_mask
    queries = 5 if query_mask is None else query_mask.sum(dim=1, keepdim=True)
    sums = torch.where(live, queries / live.sum(dim=1, keepdim=True), 0.0).double()
    torch.testing.assert_close(plan.sum(dim=-2), sums.unsqueeze(1).expand(-1, HEADS, -1), rtol=1e-6, atol=1e-9)


@every_kernel
@MASKS
def test_a_padded_batch_is_each_sample_alone_in_outputs_and_gradients(make, sides: str) -> None:
    kernel, b, n, m = make().double(), 3, 6, 8
    tensors, weights = points(b, n, m), torch.randn(b, HEADS, n, SIZE, dtype=torch.float64)
    query_mask, key_mask = masks(sides, b, n, m)
    places = query_mask, key_mask, key_mask
    for tensor, mask in zip(tensors, places, strict=True):
        if mask is not None:
            tensor.transpose(1, 2)[~mask] *= 1e6  # padding may hold anything
        tensor.requires_grad_()
    parameters = list(kernel.parameters())
    output, plan = kernel(*tensors, query_mask, key_mask), kernel.plan(*tensors[:2], query_mask, key_mask)
    gradients = torch.autograd.grad((output * weights).sum(), [*tensors, *parameters])
    alone_of_parameters = [torch.zeros_like(parameter) for parameter in parameters]
    for sample in range(b):
        own = [real(t.detach(), mask, sample).requires_grad_() for t, mask in zip(tensors, places, strict=True)]
        alone = kernel(*own)
        assert difference(real(output, query_mask, sample), alone) < FLOAT64
        plan_alone = real(real(plan, query_mask, sample).transpose(-1, -2), key_mask, sample).transpose(-1, -2)
        assert difference(plan_alone, kernel.plan(*own[:2])) < FLOAT64
        expected = torch.autograd.grad((alone * real(weights, query_mask, sample)).sum(), [*own, *parameters])
        for gradient, mask, other in zip(gradients, places, expected, strict=False):
            assert difference(real(gradient, mask, sample), other) < FLOAT64
        for total, gradient in zip(alone_of_parameters, expected[3:], strict=True):
            total += gradient
    for gradient, total in zip(gradients[3:], alone_of_parameters, strict=True):
        assert difference(gradient, total) < FLOAT64
    for padded, mask in ((output, query_mask), (plan, query_mask), (plan.transpose(-1, -2), key_mask)):
        assert mask is None or padded.transpose(1, 2)[~mask].count_nonzero() == 0
    for gradient, mask in zip(gradients, places, strict=False):
        assert mask is None or gradient.transpose(1, 2)[~mask].count_nonzero() == 0


@every_kernel
@MASKS
def test_a_sample_that_is_nothing_but_padding_gets_zeros_and_spoils_nothing(make, sides: str) -> None:
    kernel, tensors = make().double(), points(2, 4, 5)
    query_mask, key_mask = masks(sides, 2, 4, 5)
    for mask in (query_mask, key_mask):
        if mask is not None:
            mask[0] = False
    output = kernel(*(tensor.requires_grad_() for tensor in tensors), query_mask, key_mask)
    assert output[0].count_nonzero() == 0
    assert bool(output[1].isfinite().all())
    for gradient in torch.autograd.grad(output.square().sum(), [*tensors, *kernel.parameters()]):
        assert bool(gradient.isfinite().all())


@every_kernel
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(make, masked: bool) -> None:
    kernel, tensors = make().double(), points(1, 3, 4)
    mask = (torch.tensor([[True, False, True]]), torch.tensor([[False, True, True, True]])) if masked else (None, None)
    inputs = [*(tensor[:, :, :, :2].clone().requires_grad_() for tensor in tensors)]
    if parameters := list(kernel.parameters()):
        inputs = [*(tensor.requires_grad_() for tensor in tensors), *parameters]
    assert torch.autograd.gradcheck(lambda q, k, v, *_: kernel(q, k, v, *mask), inputs)


@every_kernel
@pytest.mark.parametrize("masked", [False, True])
def test_scores_of_thousands_give_neither_nan_nor_infinity_forward_or_backward(make, masked: bool) -> None:
    kernel, (q, k, v) = make(), points(2, 32, 40, torch.float32)
    mask = masks("both", 2, 32, 40) if masked else (None, None)
    q, k = (30 * q).requires_grad_(), (30 * k).requires_grad_()
    plan, output = kernel.plan(q, k, *mask), kernel(q, k, v, *mask)
    for gradient in torch.autograd.grad(output.square().sum(), [q, k, *kernel.parameters()]):
        assert bool(gradient.isfinite().all())
    assert bool(output.isfinite().all())
    sums = torch.ones(2, 1, 32) if mask[0] is None else mask[0].unsqueeze(1).float()
    torch.testing.assert_close(plan.sum(dim=-1), sums.expand(-1, HEADS, -1), rtol=1e-4, atol=1e-4)


def test_kernels_are_made_by_name_and_sinkhorn_without_iterations_is_softmax() -> None:
    kinds = {"softmax": Softmax, "sinkhorn": Sinkhorn, "sliced": SlicedTransport, "one_pass": OnePass}
    for name, kind in kinds.items():
        assert type(kernel_of(name, HEADS, SIZE)) is kind
    assert type(kernel_of("sinkhorn", HEADS, SIZE, iterations=0)) is Softmax
    sinkhorn = kernel_of("sinkhorn", HEADS, SIZE, 0.5, 3, form="recompute")
    assert isinstance(sinkhorn, Sinkhorn)
    assert (sinkhorn.epsilon, sinkhorn.iterations, sinkhorn.form) == (0.5, 3, "recompute")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(kernel_of, "magic", HEADS, SIZE), "there is no attention 'magic'; there are softmax, sinkhorn"),
        (partial(Sinkhorn, form="cubic"), "there is no form 'cubic' of Sinkhorn attention; there are log, scaling"),
        (partial(Sinkhorn, iterations=0), "iterations must be above 0, not 0"),
        (partial(Sinkhorn, epsilon=-1.0), "epsilon must be above 0, not -1.0"),
        (partial(SlicedTransport, slices=0), "slices must be above 0, not 0"),
        (partial(OnePass, HEADS, SIZE, pieces=0), "pieces must be above 0, not 0"),
        (partial(Attention, 16, 3), "a width of 16 cannot be shared out among 3 heads"),
    ],
)
def test_arguments_that_make_no_kernel_are_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
