"""Networks that are trained to stand for half-steps on small plans, from the calibration to the compiled model."""

import json

import numpy as np
import pytest
import torch
from helpers.fitted import site
from helpers.tolerances import FLOAT32, difference
from torch import nn

import asapc
from asapc.commands.verify import verify_model
from asapc.errors import CheckpointError, FidelityError
from asapc.loading.choice import read_choice
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.tensors import read_safetensors
from asapc.planning import amortise as module
from asapc.planning.amortise import train, why_not_amortised
from asapc.planning.cache import Entry, pack, unpack
from asapc.planning.operators import amortised_operator, exact_operator, lowerings
from asapc.types.choices import Alternatives, AmortisedParams, Candidate
from asapc.types.results import SiteFidelity

SPREAD, ITERATIONS, TOKENS = 4.0, 20, 96


def small(half_steps=40, **changes):
    """A site of a 4 x 6 plan a token, which is read and not a product."""
    return site(half_steps, **{"heads": TOKENS, "queries": 4, "keys": 6, "product": None, **changes})


def scores(count, seed):
    return 2 * torch.randn(2, count, 4, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("last", ["rows", "columns"])
def test_a_network_makes_few_half_steps_much_closer(last):
    def error(plans, expected):
        return ((plans - expected).norm() / expected.norm()).item()

    mixing = small(last=last)
    training, others = scores(8192, 0), scores(512, 1)
    params = train([mixing, mixing], training, 16)
    expected = exact_operator(mixing)(others.double())
    truncated = error(exact_operator(mixing, 3)(others), expected)
    for number, of_site in enumerate(params):  # each with a network of its own
        plans = amortised_operator(mixing, of_site, 3)(others[number : number + 1])
        assert error(plans, expected[number : number + 1]) < 0.6 * truncated
    again = train([mixing, mixing], training, 16)
    assert all(torch.equal(one, two) for one, two in zip(params[1].weights, again[1].weights, strict=True))


def test_both_layouts_of_a_network_give_the_same():
    mixing = small()
    (params, _) = train([mixing, mixing], scores(256, 0), 8)
    operator = amortised_operator(mixing, params, 1)
    packed = operator(scores(64, 1))
    assert lowerings(mixing, operator) == ("materialised", "interleaved")
    operator.lowering = "interleaved"
    assert difference(operator(scores(64, 1)), packed) < FLOAT32


def test_networks_stand_for_long_loops_on_small_plans_alone(monkeypatch):
    assert why_not_amortised(small()) is None
    assert why_not_amortised(small(5))
    assert why_not_amortised(small(queries=64))
    assert why_not_amortised(small(masked=True))
    monkeypatch.setattr(module, "processes_sharing", lambda: 2)
    assert why_not_amortised(small())


class Mixing(nn.Module):
    """Streams that each token mixes by a 4 x 4 plan of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.out = nn.Linear(32, 16), nn.Linear(8, 8)

    def forward(self, x):
        plan = torch.exp(SPREAD * self.scores(x.flatten(2)).unflatten(-1, (4, 4)))
        for _ in range(ITERATIONS):
            plan = plan / plan.sum(-1, keepdim=True)
            plan = plan / plan.sum(-2, keepdim=True)
        return self.out(plan @ x)


OPTIONS = {"operators": "amortised", "fidelity": ("relc<=0.2",), "batches": (4,), "seconds": 0.1, "target": "onnx"}


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(48, TOKENS, 4, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def compiled(inputs, tmp_path_factory):
    """A model of one small plan a token, compiled with networks alone, beside samples that it has not seen."""
    folder = tmp_path_factory.mktemp("mixing")
    torch.manual_seed(0)
    program = torch.export.export(Mixing().eval(), (inputs[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, folder / "mixing.pt2")
    np.savez(folder / "calibration.npz", x=inputs[:40])
    np.savez(folder / "others.npz", x=inputs[40:])
    np.savez(folder / "far.npz", x=5 * inputs[40:])
    asapc.compile(folder / "mixing.pt2", calib=folder / "calibration.npz", out=folder / "mixing.asap", **OPTIONS)
    return folder


def test_a_model_is_compiled_and_checked_with_networks(compiled):
    report = json.loads((compiled / "mixing.asap" / "report.json").read_text())
    (of_site,) = report["sites"]
    choice, relc = of_site["choice"], of_site["fidelity"]["relc"]
    assert (choice["operator"], choice["side"], choice["features"]) == ("amortised", None, [])
    assert choice["half_steps"] in (1, 3, 5)
    verification = verify_model(compiled / "mixing.asap", compiled / "others.npz")
    assert verification.fidelity.sites[of_site["name"]].relc < 2 * relc <= 0.4
    with pytest.raises(FidelityError):
        verify_model(compiled / "mixing.asap", compiled / "far.npz")


def test_parameters_that_are_no_network_of_the_site_are_refused(compiled):
    folder = compiled / "mixing.asap"
    (of_site,) = json.loads((folder / "report.json").read_text())["sites"]
    source = Source.at(folder / "operator.safetensors", CheckpointError)
    tensors = {name.replace(of_site["name"], "attention"): t for name, t in read_safetensors(source).items()}
    square = small(queries=4, keys=4, last="columns")
    assert read_choice(source, square, of_site, tensors).params.ends == (16, 4)
    with pytest.raises(CheckpointError, match="does not fit attention"):
        read_choice(source, small(), of_site, tensors)
    with pytest.raises(CheckpointError, match="does not fit attention"):
        read_choice(source, square, of_site, {**tensors, "attention.biases.1": torch.zeros(3)})
    del tensors["attention.weights.2"]
    with pytest.raises(CheckpointError, match=r"lacks weights\.2 of attention"):
        read_choice(source, square, of_site, tensors)


def test_networks_are_found_again_in_the_cache():
    params = train([small()], scores(128, 0)[:1], 4)[0]
    fidelity = SiteFidelity(0.1, 0.1, 0.1, 0.1)
    entry = Entry(Alternatives({"attention": [Candidate("amortised", 3, 1.0, fidelity, params, "interleaved")]}))
    (again,) = unpack(pack(entry)).alternatives.candidates["attention"]
    assert isinstance(again.params, AmortisedParams)
    assert all(map(torch.equal, again.params.weights, params.weights))
    assert all(map(torch.equal, again.params.biases, params.biases))


def test_networks_are_trained_further_in_an_accelerated_model(inputs):
    torch.manual_seed(0)
    fast = asapc.accelerate(Mixing().eval(), inputs, operators="amortised", fidelity=("relc<=0.2",), batches=4)
    weights = fast.operator_parameters()
    assert len(weights) == 6
    fast(inputs[:2]).square().sum().backward()
    assert all(torch.isfinite(weight.grad).all() and weight.grad.abs().sum() > 0 for weight in weights)


def test_too_few_plans_train_no_network(monkeypatch):
    monkeypatch.setattr(module, "operand_stream", lambda graph, sites: lambda samples: [None])
    monkeypatch.setattr(module, "masked_scores", lambda site, values: torch.randn(2, TOKENS, 4, 6))
    assert module.amortise(None, [small()], None) == {"attention": []}
