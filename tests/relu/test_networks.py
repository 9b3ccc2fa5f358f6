"""Networks that are compelled to have 2^d pieces: their pieces, their convexity, and what they are made of."""

from itertools import pairwise

import onnxruntime
import pytest
import torch
from helpers.tolerances import FLOAT32, FLOAT64, difference
from hypothesis import given, settings
from hypothesis import strategies as st

from asapc.relu.networks import (
    Manifold,
    breakpoints,
    count_pieces,
    evaluate,
    scale_ratios,
    sum_of_waves,
    tent,
    to_networks,
)

quick = settings(max_examples=60, deadline=None)


@st.composite
def manifolds(draw, most=8):
    """Random points of the manifold, 1 to 3 at once, convex and concave."""
    k, depth = draw(st.integers(1, 3)), draw(st.integers(1, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    sign = draw(st.sampled_from([1.0, -1.0]))
    return Manifold(0.15 + 0.7 * uniform(k, depth + 1), sign * (0.2 + uniform(k)), 4 * uniform(k) - 2, uniform(k))


def parabola(depth, dtype=torch.float64):
    """x^2 without any training: all peaks in the middle, and a quarter of the sum of waves."""
    one = torch.ones(1, dtype=dtype)
    return Manifold(torch.full((1, depth + 1), 0.5, dtype=dtype), one / 4, one, 0 * one)


def test_a_tent_goes_up_to_its_peak_and_down_again():
    t = torch.tensor([0.0, 0.15, 0.3, 0.65, 1.0], dtype=torch.float64)
    assert torch.allclose(tent(t, torch.tensor(0.3, dtype=torch.float64)), torch.tensor([0, 0.5, 1, 0.5, 0]).double())


@quick
@given(manifolds())
def test_the_network_is_the_sum_of_waves(point):
    for domain in ((0.0, 1.0), (-3.0, 2.0)):
        x = torch.linspace(*domain, 301, dtype=torch.float64)
        assert difference(to_networks(point, domain)(x), evaluate(point, x, domain)) < FLOAT64


@quick
@given(manifolds(most=10))
def test_there_are_as_many_pieces_as_two_to_the_depth(point):
    depth = point.peaks.shape[1] - 1
    networks = to_networks(point, (-1.0, 3.0))
    assert all(count_pieces(networks.layers(k), (-1.0, 3.0)) == 2**depth for k in range(len(point.scale)))


@quick
@given(manifolds())
def test_breakpoints_have_the_values_of_the_network_and_lines_between_them(point):
    networks = to_networks(point)
    for k in range(len(point.scale)):
        x, y = breakpoints(networks.layers(k), (0.0, 1.0))
        assert (x[0].item(), x[-1].item()) == (0.0, 1.0)
        assert difference(y, networks(x)[k]) < FLOAT64
        middle = (x[:-1] + x[1:]) / 2
        assert difference((y[:-1] + y[1:]) / 2, networks(middle)[k]) < FLOAT64


@quick
@given(manifolds())
def test_it_is_convex_or_concave_as_the_sign_of_its_scale(point):
    networks = to_networks(point)
    for k, scale in enumerate(point.scale.tolist()):
        x, y = breakpoints(networks.layers(k), (0.0, 1.0))
        slopes = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
        assert ((slopes[1:] - slopes[:-1]) * scale > 0).all()


@pytest.mark.parametrize("depth", range(1, 13))
def test_a_square_is_approximated_by_the_construction_alone(depth):
    network = to_networks(parabola(depth)).layers(0)
    x, y = breakpoints(network, (0.0, 1.0))
    assert x.numel() - 1 == 2**depth
    # A chord over an interval of length h lies h^2 / 4 above x^2 in its middle, and nowhere further.
    middle = (x[:-1] + x[1:]) / 2
    worst = ((y[:-1] + y[1:]) / 2 - middle**2).abs().amax()
    assert (y - x**2).abs().amax() < 1e-12
    assert worst <= 2.0 ** (-2 * depth - 2) * (1 + 1e-9)


def test_a_sum_of_two_networks_has_the_pieces_of_both():
    peaks = torch.tensor([[0.5, 0.5, 0.5], [0.3, 0.6, 0.5]], dtype=torch.float64)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    networks = to_networks(Manifold(peaks, torch.tensor([1.0, -1.0]).double(), 0 * half, half))
    both = networks.layers(0, 1)
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert difference(both(x.unsqueeze(-1)).squeeze(-1), networks(x).sum(dim=0)) < FLOAT64
    assert count_pieces(both) == 4 + 4 - 1


def test_gradients_are_those_of_finite_differences():
    t = torch.rand(7, dtype=torch.float64)
    peaks = (0.2 + 0.6 * torch.rand(2, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: sum_of_waves(t, p), peaks)
    rest = [torch.rand(2, dtype=torch.float64).add(0.5).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(lambda p, *r: evaluate(Manifold(p, *r), t), (peaks, *rest))


def test_the_jacobian_is_that_of_automatic_differentiation():
    peaks = 0.2 + 0.6 * torch.rand(2, 4, dtype=torch.float64)
    networks = to_networks(Manifold(peaks, *(torch.rand(2, dtype=torch.float64) + 0.5 for _ in range(3))))
    x = torch.rand(5, dtype=torch.float64)
    actual = networks.jacobian(x)
    for k in range(2):
        for p in range(5):
            grads = torch.autograd.grad(networks(x)[k, p], list(networks.parameters()))
            expected = torch.cat([grad[k].flatten() for grad in grads])
            assert difference(actual[k, :, p], expected) < FLOAT64


def test_the_rule_makes_slopes_meet_in_the_limit():
    # The jump of the slope in the middle of the domain is halved, or better, with each wave that is added.
    peaks = torch.full((1, 9), 0.5, dtype=torch.float64)
    assert torch.allclose(scale_ratios(peaks), torch.tensor(0.25, dtype=torch.float64))
    jumps = []
    for depth in range(1, 8):
        x, y = breakpoints(to_networks(parabola(depth)).layers(0), (0.0, 1.0))
        slopes = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
        jumps.append((slopes[1:] - slopes[:-1]).amax().item())
    assert all(later <= earlier / 2 * (1 + 1e-9) for earlier, later in pairwise(jumps))


def test_it_exports_as_plain_layers(tmp_path):
    network = to_networks(parabola(5, torch.float32)).layers(0).eval()
    x = torch.linspace(0, 1, 50).unsqueeze(-1)
    program = torch.onnx.export(network, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("p")},))
    assert {node.op_type for node in program.model_proto.graph.node} == {"Gemm", "Relu"}
    program.save(str(tmp_path / "square.onnx"))
    actual = onnxruntime.InferenceSession(str(tmp_path / "square.onnx")).run(None, {"input": x.numpy()})[0]
    assert (torch.from_numpy(actual) - x**2).abs().amax() < 2.0 ** (-2 * 5 - 2) * (1 + 1e-3)


@pytest.mark.parametrize("depth", [3, 5, 9])
def test_in_half_precision_it_is_right_to_its_rounding_times_the_slopes(depth):
    # Each tent doubles what is off: of 11 bits so many are left.
    x = torch.linspace(0, 1, 257)
    actual = to_networks(parabola(depth, torch.float16))(x.half())[0].float()
    assert (actual - x**2).abs().amax() < 2.0 ** (-2 * depth - 2) + 2.0**-9
    assert (
        difference(to_networks(parabola(depth, torch.float32))(x)[0], evaluate(parabola(depth), x.double())[0])
        < FLOAT32
    )
