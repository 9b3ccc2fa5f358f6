"""Activation functions that are trained: where they start, what they keep, and how they leave the manifold."""

import pytest
import torch
from helpers.tolerances import FLOAT32, FLOAT64, difference
from torch import nn

from asapc.relu.networks import count_pieces, to_networks
from asapc.relu.trained import TrainedActivation


def moved(channels=3, depth=3, domain=(-2.0, 3.0)):
    """Functions that differ from channel to channel, in float64."""
    torch.manual_seed(0)
    activation = TrainedActivation(channels, depth, domain).double()
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter += 0.3 * torch.rand_like(parameter)
    return activation


def test_it_starts_as_a_parabola_between_straight_lines():
    x = torch.linspace(-8, 8, 400).unsqueeze(-1)
    actual = TrainedActivation(1, depth=4)(x)
    expected = torch.where(x > 3, x, (x.clamp(-3, 3) + 3) ** 2 / 12)
    # A chord is off by a quarter of the square of its length, times half the second derivative of 1 / 6.
    assert (actual - expected).abs().amax() <= (6 / 16) ** 2 / 8 / 6 + 1e-6


def test_each_channel_has_its_own_function_whatever_the_axes_before_it():
    activation = moved()
    x = 4 * torch.randn(2, 5, 3, dtype=torch.float64)
    actual = activation(x)
    for channel in range(3):
        alone = activation(x[..., channel : channel + 1].expand(x.shape))[..., channel]
        assert difference(actual[..., channel], alone) < FLOAT64
    same = activation(x[..., :1].expand(x.shape))
    assert not torch.allclose(same[..., 0], same[..., 1])


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_on_the_manifold_it_has_two_to_the_depth_pieces_and_bends_one_way(depth):
    activation = moved(depth=depth)
    networks = to_networks(activation.manifold())
    assert all(count_pieces(networks.layers(k)) == 2**depth for k in range(3))
    x = torch.linspace(-2, 3, 300, dtype=torch.float64).unsqueeze(-1).expand(-1, 3)
    y = activation(x)
    assert (y[2:] - 2 * y[1:-1] + y[:-2] > -1e-9).all()


def test_freed_it_is_the_same_function_of_more_weights_that_are_all_trained():
    activation = moved()
    x = 4 * torch.randn(50, 3, dtype=torch.float64)
    before = activation(x)
    activation.free()
    assert difference(activation(x), before) < FLOAT64
    activation(x).square().sum().backward()
    assert {name for name, _ in activation.named_parameters()} == {
        *("below", "above"),
        *(f"networks.{name}" for name in ("first", "first_bias", "hidden", "hidden_bias", "last")),
    }
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in activation.parameters())
    activation.free()  # once is enough
    assert difference(activation(x), before) < FLOAT64


def test_gradients_are_those_of_finite_differences():
    activation = moved(channels=2, depth=2)
    names = [name for name, _ in activation.named_parameters()]
    x = torch.tensor([[-3.1, 0.37], [1.13, 4.2]], dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        return torch.func.functional_call(activation, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *activation.parameters()))


def test_it_trains_in_a_larger_network_in_both_stages_and_is_relu_alone_in_onnx():
    torch.manual_seed(0)
    activation = TrainedActivation(8)
    network = nn.Sequential(nn.Linear(2, 8), activation, nn.Linear(8, 1))
    x = 2 * torch.rand(256, 2) - 1
    y = (x[:, :1] * x[:, 1:]) ** 2

    def descend(steps):
        optimiser = torch.optim.Adam(network.parameters(), 1e-2)
        for _ in range(steps):
            optimiser.zero_grad()
            loss = (network(x) - y).square().mean()
            loss.backward()
            optimiser.step()
        return loss.item()

    spread = y.var().item()
    on_manifold = descend(300)
    assert on_manifold < spread / 2
    activation.free()
    freed = network(x).detach()
    assert descend(300) < on_manifold
    assert not torch.equal(network(x), freed)
    program = torch.onnx.export(network.eval(), (x,), dynamo=True, verbose=False)
    functions = {node.op_type for node in program.model_proto.graph.node}
    assert "Relu" in functions
    assert not functions & {"Clip", "Where", "Min", "Max", "Exp", "Erf"}
    assert difference(program(x)[0], network(x)) < FLOAT32


@pytest.mark.parametrize("options", [{"channels": 0}, {"depth": 0}, {"domain": (1.0, 1.0)}])
def test_what_makes_no_function_is_refused(options):
    with pytest.raises(ValueError, match="at least"):
        TrainedActivation(**{"channels": 2, **options})
