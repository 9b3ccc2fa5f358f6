"""ReLU networks that replace smooth activations: each alone, and in a compiled model."""

import json

import jsonschema
import onnx
import pytest
import torch
from helpers.paths import ROOT
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from asapc.capturing.export import export
from asapc.config import CompileConfig
from asapc.errors import OptionError
from asapc.passes.rewrite.activations import LowerActivations, activation
from asapc.relu.stand_ins import fit_activation, fit_activations
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples

FUNCTIONS = {
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": nn.functional.softplus,
    "exp": torch.exp,
}
ENDS = -6.0, 4.0


def fitted(name, error, dtype=torch.float32):
    return fit_activation(name, FUNCTIONS[name], ENDS, error, dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_stand_in_is_as_close_as_asked_and_as_close_as_it_says(name):
    fit = fitted(name, 1e-2)
    x = torch.linspace(*ENDS, 10_001)
    with torch.no_grad():
        off = (fit.module(x) - FUNCTIONS[name](x)).abs().amax().item()
    assert fit.error <= 1e-2
    assert off == pytest.approx(fit.error, rel=0.05)


def test_it_takes_twice_the_units_for_a_quarter_of_the_error():
    coarse, fine = fitted("gelu", 1e-2), fitted("gelu", 1e-2 / 16)
    assert 3 < fine.units / coarse.units < 5


def test_it_goes_on_straight_beyond_its_range():
    fit = fit_activation("gelu", nn.functional.gelu, (-8.0, 8.0), 1e-3, torch.float64)
    x = torch.tensor([-1000.0, -100.0, 100.0, 1000.0], dtype=torch.float64)
    with torch.no_grad():
        assert (fit.module(x) - nn.functional.gelu(x)).abs().amax() < 2e-3


def test_an_error_that_cannot_be_kept_is_refused_with_the_least_that_can():
    with pytest.raises(OptionError, match=r"tanh from -6 to 4 is off by \d.* not by 1e-12"):
        fitted("tanh", 1e-12)


class Layers(nn.Module):
    """Two functions, one of them twice; what a masked softmax by hand does is not finite."""

    def forward(self, x):
        masked = torch.where(x > 0, x, -torch.inf)
        weights = torch.exp(masked - masked.amax(dim=-1, keepdim=True))
        return torch.tanh(nn.functional.gelu(x)) + nn.functional.gelu(2 * x, approximate="none"), weights


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    samples = Samples({"x": torch.randn(40, 7)})
    return CapturedGraph(export(Layers(), samples[:2].inputs), samples[:2]), samples


def kinds(module: GraphModule):
    return [name for name in map(activation, module.graph.nodes) if name is not None]


def test_each_function_is_fitted_once_on_the_range_of_all_its_nodes(layers):
    graph, samples = layers
    x = samples.inputs["x"]
    fits = {each.name.split(",")[0]: each for each in fit_activations(graph.program.module(), samples, 1e-2)}
    assert set(fits) == {"gelu", "tanh"}  # exp is given -inf, and stays
    assert fits["gelu"].nodes == 2
    assert fits["tanh"].nodes == 1
    assert fits["gelu"].low < 2 * x.amin()
    assert fits["gelu"].high > 2 * x.amax()


def test_nothing_is_fitted_unless_it_was_asked_for(layers):
    graph, samples = layers
    assert fit_activations(graph.program.module(), samples, 0.0) == []


def test_the_pass_replaces_what_has_a_stand_in_once_and_nothing_else(layers):
    graph, samples = layers
    module = graph.program.module()
    x = samples.inputs["x"]
    expected = module(x)
    fits = fit_activations(module, samples, 1e-3)
    lower = LowerActivations({each.name: each.module for each in fits})
    result = lower(module)
    assert result.modified
    assert kinds(result.program) == ["exp, float32"]
    with torch.no_grad():
        actual = result.program(x)
    assert (actual[0] - expected[0]).abs().amax() < 5e-3
    assert torch.equal(actual[1], expected[1])
    assert not lower(result.program).modified


def test_other_options_and_other_floats_are_other_functions():
    class Different(nn.Module):
        def forward(self, x):
            return nn.functional.gelu(x, approximate="tanh") + nn.functional.gelu(x) + nn.functional.gelu(x.double())

    samples = Samples({"x": torch.randn(4, 3)})
    assert len(set(kinds(export(Different(), samples.inputs).module()))) == 3


def test_a_graph_without_metadata_is_no_matter_of_this_pass():
    traced = symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert not LowerActivations({}).call(traced).modified


def test_a_compiled_model_has_relu_alone_and_says_what_that_costs(point_model):
    _, compile_it = point_model
    report = compile_it(relu_activations=1e-2)
    schema = (ROOT / "docs" / "report.schema.json").read_text()
    jsonschema.validate(report.data, json.loads(schema))
    (gelu,) = report.data["activations"]
    assert gelu["name"].startswith("gelu")
    assert gelu["error"] <= 1e-2
    hops = {hop["name"]: hop["rel"] for hop in report.data["fidelity"]["hops"]}
    assert list(hops) == ["capture", "amortisation", "activations", "export"]
    assert hops["amortisation"] < 1e-5 < hops["activations"] < 0.1
    assert hops["export"] < 1e-5
    operators = {node.op_type for node in onnx.load(report.folder / "model.onnx").graph.node}
    assert not operators & {"Gelu", "Erf", "Tanh"}


@pytest.mark.parametrize("error", [-1.0, float("nan"), float("inf")])
def test_an_error_that_makes_no_sense_is_refused(error):
    with pytest.raises(OptionError, match="--relu-activations cannot be"):
        CompileConfig(relu_activations=error)
