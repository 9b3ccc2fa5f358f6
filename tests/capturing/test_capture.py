"""Capture: batches of one, what models may return, and that nothing else changes."""

import pytest
import torch
import torch.nn.functional as F
from helpers.stopping import Done, While, captured, loaded, scores
from torch import nn

from asapc.capturing.capture import EXAMPLE_BATCH, capture_code
from asapc.capturing.export import export
from asapc.errors import CaptureError, SamplesError
from asapc.loading.model import load_model
from asapc.types.samples import Samples


class Ordinary(nn.Module):
    """Asks nothing; writes in place, draws constants, and branches on its own options."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 5), nn.LayerNorm(5)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.register_buffer("mask", torch.ones(5, 5).tril().bool())

    def forward(self, x):
        y = self.norm(self.layer(x)).masked_fill(~self.mask, 0.0)
        y /= y.norm(dim=-1, keepdim=True) + torch.tensor(1e-6)
        y[..., 0] = F.dropout(x, 0.1, self.training)[..., 0]
        return self.attention(y, y, y)[0] if y.shape[-1] == 5 else y


def dump(program) -> list[object]:
    return [
        str(program),
        [
            (str(node.meta.get("val")), node.meta.get("stack_trace"), node.meta.get("nn_module_stack"))
            for node in program.graph.nodes
        ],
        sorted(program.constants),
    ]


@pytest.mark.parametrize("kind", ["ordinary", "shipped"])
def test_a_model_that_asks_nothing_is_captured_as_without_all_this(kind, shipped):
    if kind == "ordinary":
        model, samples = loaded(Ordinary()), scores()
    else:
        model = load_model(shipped)
        samples = model.calibration
    graph = capture_code(model, samples)
    assert graph.early_stops is None
    assert dump(graph.program) == dump(export(model.module, samples[:EXAMPLE_BATCH].inputs))


def test_samples_that_the_model_refuses_are_named_by_all_their_shape():
    samples = scores(count=24)
    with pytest.raises(SamplesError, match=r"\(24, 5, 5\)"):
        captured(nn.LayerNorm(7), Samples({"input": samples.inputs["x"]}))


class Squeezes(nn.Module):
    """Forgets the batch where it is one."""

    def forward(self, x):
        row = x.sum(-1).squeeze()
        return x + row[:, None] if row.dim() > 1 else x + row[None, None] * 2


class Branches(nn.Module):
    def forward(self, x):
        return x * 2 if x.flatten(1).squeeze().dim() > 1 else x * 3


class SqueezesOutput(nn.Module):
    def forward(self, x):
        return x.sum(-1).squeeze()


class FailsForOne(nn.Module):
    def forward(self, x):
        return x.sum(-1).squeeze().unsqueeze(2)


@pytest.mark.parametrize("kind", [Squeezes, Branches, SqueezesOutput, FailsForOne])
def test_what_a_model_does_for_a_batch_of_one_alone_is_noticed(kind):
    with pytest.raises(CaptureError, match=r"batch of one|at batch 1") as caught:
        captured(kind())
    assert "batch of one" in caught.value.hint
    assert "\n" not in str(caught.value)


class Noisy(nn.Module):
    def forward(self, x):
        return x + 1e-9 * torch.rand_like(x)


class Short(nn.Module):
    """Its float16 and bfloat16 round what float32 would not."""

    def forward(self, x):
        return (x.bfloat16().cos() @ x.half().mT.bfloat16()).float()


@pytest.mark.parametrize("kind", [Noisy, Short, While, Done])
def test_noise_short_floats_and_early_stops_are_no_reason_to_refuse_a_batch_of_one(kind):
    assert captured(kind()).program is not None


class Returns(nn.Module):
    def __init__(self, more) -> None:
        super().__init__()
        self.more = more

    def forward(self, x):
        return self.more(x)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (lambda x: {"logits": x * 2, "n": 3}, ["['n']", "int"]),
        (lambda x: (x * 2, {"deep": [x, "text"]}), ["[1]['deep'][1]", "str"]),
        (lambda x: (x * 2, x.shape[0]), ["[1]", "int"]),
        (lambda x: 2.0, ["the model's output is", "float"]),
        (lambda x: None, ["returns nothing"]),
    ],
)
def test_outputs_that_are_no_tensors_are_refused_by_their_place(more, words):
    with pytest.raises(CaptureError) as caught:
        captured(Returns(more))
    assert all(word in str(caught.value) for word in words)
    assert caught.value.hint


def test_none_among_the_outputs_is_left_out():
    graph = captured(Returns(lambda x: {"logits": x * 2, "loss": None}))
    assert torch.equal(graph.program.module()(scores().inputs["x"])["logits"], 2 * scores().inputs["x"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_quantised_layers_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    samples = Samples({"input": torch.rand(4, 4)})
    with pytest.raises(CaptureError, match="quantised layers") as refusal:
        captured(quantised, samples)
    assert "0._packed_params, 2._packed_params" in str(refusal.value)
    assert "float model" in refusal.value.hint
    assert captured(model, samples).program is not None
