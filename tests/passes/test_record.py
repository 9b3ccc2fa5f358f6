import pytest
import torch
from torch import nn

from asapc.capturing.export import export
from asapc.passes.record import record, record_with_outputs
from asapc.types.samples import Samples


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, y):
        z = self.linear(x) * y
        return z.add_(1)


def fail(*operands):
    raise ZeroDivisionError


def graph_and_samples():
    samples = Samples({"x": torch.randn(4, 3), "y": torch.randn(4, 3)})
    return InPlace(), export(InPlace(), samples[:2].inputs).module(), samples


def test_the_values_of_the_named_nodes_are_kept_and_no_others():
    _, module, samples = graph_and_samples()
    values = record(module, samples, {"linear", "x"})
    assert set(values) == {"linear", "x"}
    assert torch.equal(values["x"], samples.inputs["x"])
    expected = nn.functional.linear(samples.inputs["x"], module.linear.weight, module.linear.bias)
    torch.testing.assert_close(values["linear"], expected, rtol=0, atol=0)


def test_inputs_go_in_by_their_order():
    _, module, samples = graph_and_samples()
    values = record(module, samples, {"x", "y"})
    assert torch.equal(values["y"], samples.inputs["y"])


def test_a_value_is_what_it_was_before_the_model_wrote_into_it():
    _, module, samples = graph_and_samples()
    names = [node.name for node in module.graph.nodes if node.name.startswith(("mul", "add"))]
    product, total = record(module, samples, names).values()
    assert torch.equal(product + 1, total)


def test_the_batch_may_differ_from_the_one_captured():
    _, module, samples = graph_and_samples()
    assert record(module, samples[:1], {"linear"})["linear"].shape == (1, 3)
    assert record(module, samples, {"linear"})["linear"].shape == (4, 3)


def test_nothing_is_recorded_for_autograd():
    _, module, samples = graph_and_samples()
    assert not record(module, samples, {"linear"})["linear"].requires_grad


def test_names_that_are_not_in_the_graph_have_no_value():
    _, module, samples = graph_and_samples()
    assert record(module, samples, {"elsewhere"}) == {}


def test_nothing_after_the_last_value_is_computed():
    _, module, samples = graph_and_samples()
    [last] = [node for node in module.graph.nodes if node.name.startswith("add")]
    last.target = fail  # comes after the product
    [product] = [node.name for node in module.graph.nodes if node.name.startswith("mul")]
    assert set(record(module, samples, {product})) == {product}
    with pytest.raises(ZeroDivisionError):
        record(module, samples, {product, last.name})


def test_outputs_come_with_the_values_where_they_are_asked_for():
    _, module, samples = graph_and_samples()
    values, (output,) = record_with_outputs(module, samples, {"linear"})
    assert set(values) == {"linear"}
    assert output.shape == values["linear"].shape == (4, 3)
