"""Axes that a compiled model leaves open: what can be asked for, and what is refused."""

from pathlib import Path

import pytest
import torch
from helpers.tolerances import FLOAT32, difference
from torch import nn

import asapc
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.capturing.capture import capture_code
from asapc.capturing.dynamic import parse_axes, reopen
from asapc.capturing.export import export
from asapc.config import CompileConfig
from asapc.errors import CaptureError, OptionError
from asapc.models.pointset import PointTransformer
from asapc.types.graph import DynamicAxis
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples

SAMPLES = Samples({"points": torch.randn(4, 24, 3), "mask": torch.ones(4, 24), "weight": torch.ones(4)})
BATCH = DynamicAxis("batch", 1, None)


def test_axes_are_the_batch_alone_where_nothing_is_asked_for():
    assert parse_axes("", SAMPLES) == {name: {0: BATCH} for name in SAMPLES.inputs}


def test_seq_is_the_second_axis_of_every_input_that_has_one():
    axes = parse_axes("batch=2:8, seq=16:48", SAMPLES)
    batch, seq = DynamicAxis("batch", 2, 8), DynamicAxis("seq", 16, 48)
    assert axes == {"points": {0: batch, 1: seq}, "mask": {0: batch, 1: seq}, "weight": {0: batch}}


def test_an_axis_can_be_named_by_its_input_and_number():
    assert parse_axes("points.1=16:48", SAMPLES)["points"][1] == DynamicAxis("points_1", 16, 48)


@pytest.mark.parametrize(
    "text",
    ["seq", "seq=16", "seq=48:16", "seq=16:16", "seq=16:20", "seq=32:64", "seq=0:64", "points.7=1:9", "points.0=1:9",
     "other.1=1:9", "seq=-1:64", "=1:64", "seq=16:48;batch=1:2"],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_hint(text):
    with pytest.raises(OptionError) as caught:
        parse_axes(text, SAMPLES)
    assert caught.value.hint


def test_seq_is_refused_where_inputs_differ_in_length():
    with pytest.raises(OptionError, match="5, 7"):
        parse_axes("seq=2:9", Samples({"queries": torch.ones(2, 5, 3), "keys": torch.ones(2, 7, 3)}))


@pytest.mark.usefixtures("quick")
def test_a_mask_that_is_sliced_for_its_axes_stays_a_mask_of_any_length(tmp_path, monkeypatch):
    """`mask[:, None, None, :]` is a slice in a graph of one length, and none where the length is open."""
    (tmp_path / "padded.py").write_text(
        "import torch, torch.nn as nn\n"
        "class Padded(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embed, self.qkv = nn.Embedding(50, 16), nn.Linear(16, 48)\n"
        "    def forward(self, ids):\n"
        "        padding = (ids == 0)[:, None, None, :]\n"
        "        x = self.qkv(self.embed(ids)).unflatten(-1, (3, 2, 8))\n"
        "        q, k, v = x.permute(2, 0, 3, 1, 4)\n"
        "        s = (q @ k.mT).masked_fill(padding, -1e9)\n"
        "        for _ in range(3):\n"
        "            s = (s - s.logsumexp(-2, keepdim=True)).masked_fill(padding, -1e9)\n"
        "            s = s - s.logsumexp(-1, keepdim=True)\n"
        "        return (s.exp() @ v).mean(dim=(1, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    from padded import Padded

    model = Padded().eval()
    torch.save(model.state_dict(), "model.pt")
    ids = torch.randint(1, 50, (32, 24)) * (torch.arange(24) < torch.randint(8, 25, (32, 1)))
    torch.save({"ids": ids}, "samples.pt")
    options = {
        "model": "padded:Padded",
        "calib": "samples.pt",
        "level": 1,
        "seconds": 0.1,
        "batches": (1,),
        "target": "onnx",
    }
    report = asapc.compile("model.pt", config=CompileConfig(out="out", dynamic="seq=6:48", lowering="fused", **options))
    assert [site["choice"]["lowering"] for site in report.data["sites"]] == ["fused"]
    run = OnnxRuntimeRunner(tmp_path / "out" / "model.onnx")
    for length in (6, 31, 48):
        other = torch.randint(1, 50, (3, length)) * (torch.arange(length) < torch.tensor([[length], [4], [2]]))
        with torch.no_grad():
            assert difference(run(Samples({"ids": other}))[0], model(other)) < FLOAT32


class OtherWhereOpen(torch.nn.Module):
    """Does as many operations where the length is open, but one of another kind."""

    def forward(self, points):
        activated = points.relu() if type(points.shape[1]) is int else points.sigmoid()
        return activated.sum(dim=1)


def test_a_model_that_does_as_many_but_other_operations_with_open_axes_is_refused():
    samples = Samples({"points": torch.randn(4, 24, 3)})
    loaded = LoadedModel(OtherWhereOpen(), Path("model.pt"), sha256="", parameters=0, calibration=None, held_out=None)
    graph = capture_code(loaded, samples)
    axes = parse_axes("seq=12:48", samples)
    with pytest.raises(CaptureError, match="other operations") as caught:
        reopen(loaded, samples, axes, graph, [], "bound")
    assert caught.value.hint


class Flattened(nn.Module):
    """Tokens after three of the model's own, which are the last axis where two others are made one."""

    def forward(self, points):
        points = torch.cat([points.new_ones(points.shape[0], 3, 8), points], dim=1).transpose(1, 2)  # B 8 N+3
        hinges = torch.relu(points.unsqueeze(-2) - torch.arange(7.0).unsqueeze(-1)).flatten(-3, -2)  # B 56 N+3
        return hinges.mT @ hinges.flatten(1).sum(dim=1)[:, None, None].expand(-1, 56, 1)


def test_axes_beside_an_open_length_and_a_constant_are_made_one():
    points = torch.randn(4, 11, 8)
    axes = parse_axes("batch=1:8,seq=2:512", Samples({"points": points}))
    module = export(Flattened(), {"points": points}, axes).module()
    for batch, length in ((1, 2), (3, 29)):
        points = torch.randn(batch, length, 8)
        assert torch.equal(module(points), Flattened()(points))


def test_a_model_of_one_length_is_refused_and_named(tmp_path, monkeypatch):
    (tmp_path / "fixed.py").write_text(
        "import torch, torch.nn as nn\nfrom asapc.models.pointset import PointTransformer\n"
        "class FixedLength(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.position = nn.Parameter(torch.randn(24, 3))\n"
        "        self.rest = PointTransformer(width=16, heads=2, iterations=4)\n"
        "    def forward(self, points):\n"
        "        return self.rest(points + self.position)\n"
    )
    monkeypatch.chdir(tmp_path)
    weights = PointTransformer(width=16, heads=2, iterations=4).state_dict()
    torch.save({"position": torch.randn(24, 3), **{f"rest.{k}": v for k, v in weights.items()}}, "model.pt")
    torch.save({"points": torch.randn(32, 24, 3)}, "samples.pt")
    config = CompileConfig(
        out="out", model="fixed:FixedLength", calib="samples.pt", level=1, dynamic="seq=12:48", seconds=0.1
    )
    with pytest.raises(CaptureError, match="seq"):
        asapc.compile("model.pt", config=config)
    assert not (tmp_path / "out").exists()
