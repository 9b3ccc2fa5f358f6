"""Archives of torch.export that are read, and those that cannot be compiled."""

from pathlib import Path

import pytest
import torch
from helpers.hostile import Tiny, assert_refused, export, hint_of, rezip
from helpers.tolerances import FLOAT32, difference
from torch import nn
from torch.export import Dim

from asapc.capturing.capture import capture_exported
from asapc.config import CompileConfig
from asapc.errors import CheckpointError, OptionError
from asapc.loading.model import load_model
from asapc.passes.find.evidence import find_with_evidence
from asapc.types.samples import Samples


def test_an_archive_gives_the_program_and_its_sample_inputs(whole):
    module = Tiny()
    loaded = load_model(export(whole.with_name("own.pt2"), module.eval()))
    assert loaded.parameters == sum(p.numel() for p in module.parameters())
    assert loaded.example.inputs["x"].shape == (2, 3, 4)
    assert (loaded.calibration, loaded.held_out) == (None, None)
    graph = capture_exported(loaded, loaded.example)
    assert graph.program is loaded.program
    for batch in (1, 2, 5):
        x = torch.rand(batch, 3, 4)
        assert torch.allclose(graph.program.module()(x), module(x))


def test_where_the_code_stands_survives(whole):
    program = load_model(whole).program
    assert any("hostile.py" in (node.stack_trace or "") for node in program.graph.nodes)
    assert any(node.meta.get("nn_module_stack") for node in program.graph.nodes)


def test_an_archive_without_sample_inputs_is_read(whole, tmp_path):
    path = rezip(whole, tmp_path / "bare.pt2", {"data/sample_inputs/model.pt": b""})
    assert load_model(path).example is None
    shapes = CompileConfig(input_shape=("x=2,3,4",))
    assert load_model(path, shapes).example.inputs["x"].shape == (2, 3, 4)


def test_writes_in_place_are_gone(tmp_path):
    class InPlace(nn.Module):
        def forward(self, x):
            y = x * 2
            y /= y.sum(-1, keepdim=True)
            return y

    program = load_model(export(tmp_path / "m.pt2", InPlace())).program
    assert not any(str(node.target).endswith("_.Tensor") for node in program.graph.nodes)


class Varied(nn.Module):
    """What archives of real models hold: constants, buffers, integers, masks, regions without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.convolution = nn.Embedding(9, 4), nn.Conv1d(4, 4, 3, padding=1)
        self.norm, self.encoder = nn.BatchNorm1d(4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = self.tied = nn.Linear(4, 2)
        self.register_buffer("position", torch.rand(5, 4), persistent=False)

    def forward(self, ids, keep):
        x = self.embed(ids) + self.position + torch.tensor([1.0, 2.0, 3.0, 4.0])
        x = self.norm(self.convolution(x.mT)).mT
        x = self.encoder(nn.functional.gelu(x, approximate="tanh"), src_key_padding_mask=~keep)
        with torch.no_grad():
            weight = torch.where(keep, 1.0, 0.0).unsqueeze(-1)
        return {"logits": self.head((x * weight).sum(1)), "attention": torch.einsum("bnd,bmd->bnm", x, x)}


def test_a_varied_program_gives_what_its_module_gives(tmp_path):
    module, batch = Varied().eval(), Dim("batch")
    ids, keep = torch.randint(0, 9, (3, 5)), torch.rand(3, 5) > 0.2
    torch.export.save(
        torch.export.export(module, (ids, keep), dynamic_shapes=({0: batch}, {0: batch})), tmp_path / "m.pt2"
    )
    loaded = load_model(tmp_path / "m.pt2")
    assert list(loaded.example.inputs) == ["ids", "keep"]
    for size in (1, 3):
        actual, expected = loaded.module(ids[:size], keep[:size]), module(ids[:size], keep[:size])
        for name, value in expected.items():
            assert difference(actual[name], value) <= FLOAT32


def test_an_archive_of_a_gpu_is_read_on_the_cpu(whole, tmp_path):
    path = rezip(
        whole, tmp_path / "m.pt2", lambda name, content: content.replace(b'{"type": "cpu"', b'{"type": "cuda"')
    )
    assert b"cuda" in path.read_bytes()
    assert {p.device.type for p in load_model(path).module.parameters()} == {"cpu"}


@pytest.mark.parametrize("dim", [Dim.DYNAMIC, Dim.AUTO, Dim("tokens", min=2, max=99)])
def test_axes_that_an_archive_leaves_open_get_the_length_of_the_samples(dim, tmp_path):
    batch = dim if dim in (Dim.DYNAMIC, Dim.AUTO) else Dim("batch")
    program = torch.export.export(Open().eval(), (torch.rand(4, 6, 8),), dynamic_shapes=({0: batch, 1: dim},))
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = load_model(tmp_path / "m.pt2")
    assert loaded.inputs["x"].sizes == (None, None, 8)
    samples = Samples({"x": torch.randn(8, 5, 8)})
    graph = capture_exported(loaded, samples)
    (site,) = find_with_evidence(graph, samples).sites
    assert (site.loop.half_steps, site.loop.queries, site.loop.keys) == (6, 5, 5)
    assert difference(graph.program.module()(samples.inputs["x"]), loaded.module(samples.inputs["x"])) <= FLOAT32


class Open(nn.Module):
    """Attention with Sinkhorn over any number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        scores = self.layer(x) @ x.mT
        for _ in range(3):
            scores = scores.log_softmax(-2).log_softmax(-1)
        return scores.exp() @ x


def test_an_archive_takes_no_model(whole):
    with pytest.raises(OptionError, match="needs no model"):
        load_model(whole, CompileConfig(model="a:b"))


class Dropping(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, training=self.training)


class Keyed(nn.Module):
    def forward(self, x, *, y):
        return x + y


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch": None}, "fixed batch"),
        ({"batch": Dim("batch", max=64)}, "every size"),
        ({"batch": Dim("batch", min=4)}, "every size"),
        ({"module": Dropping().train()}, "training"),
    ],
)
def test_an_archive_that_cannot_be_compiled_is_refused_with_the_way_out(options, word, tmp_path):
    path = tmp_path / "m.pt2"
    inputs = torch.rand(5, 3, 4)
    batch = options.get("batch", Dim("batch"))
    program = torch.export.export(
        options.get("module", Tiny().eval()), (inputs,), dynamic_shapes=({0: batch},) if batch else None
    )
    torch.export.save(program, path)
    assert word in assert_refused(CheckpointError, load_model, path)
    if "batch" in options:
        assert 'Dim("batch")' in hint_of(load_model, path)


class Cast(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.head, self.options = nn.Linear(4, 2), options

    def forward(self, x):
        with torch.autocast("cpu", **self.options):
            return self.head(x)


def test_automatic_casts_to_bfloat16_are_refused_with_the_way_out(tmp_path):
    path = export(tmp_path / "cast.pt2", Cast())
    assert "automatic casts to bfloat16" in assert_refused(CheckpointError, load_model, path)
    assert "--model" in hint_of(load_model, path)
    for name, options in {"off": {"enabled": False}, "float16": {"dtype": torch.float16}}.items():
        assert load_model(export(tmp_path / f"{name}.pt2", Cast(**options))).program is not None


def test_inputs_by_keyword_or_in_containers_are_refused(tmp_path):
    x, b = torch.rand(2, 3), Dim("batch")
    program = torch.export.export(Keyed(), (x,), {"y": x}, dynamic_shapes={"x": {0: b}, "y": {0: b}})
    torch.export.save(program, tmp_path / "m.pt2")
    assert "by position" in assert_refused(CheckpointError, load_model, tmp_path / "m.pt2")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    module = Tiny().eval()
    module.head.weight.data[0, 0] = torch.nan
    assert "head.weight" in assert_refused(CheckpointError, load_model, export(tmp_path / "m.pt2", module))


class WithConstants(nn.Module):
    """Has a buffer that is saved, one that is not, a plain tensor, and a number to fill with."""

    def __init__(self, **values: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("saved", values.get("saved", torch.tensor([0.0, -torch.inf])))
        self.register_buffer("unsaved", values.get("unsaved", torch.zeros(2)), persistent=False)
        self.plain = values.get("plain", torch.zeros(2))

    def forward(self, x):
        return torch.where(x > 9, torch.tensor(torch.nan), x) + self.saved + self.unsaved + self.plain


def with_constants(path: Path, **values: torch.Tensor) -> Path:
    shapes = ({0: Dim("batch")},)
    torch.export.save(torch.export.export(WithConstants(**values), (torch.rand(2, 2),), dynamic_shapes=shapes), path)
    return path


@pytest.mark.parametrize("name", ["saved", "unsaved", "plain"])
def test_nan_in_buffers_and_constants_is_refused(name, tmp_path):
    path = with_constants(tmp_path / "m.pt2", **{name: torch.tensor([1.0, torch.nan])})
    assert name in assert_refused(CheckpointError, load_model, path)


def test_infinities_of_a_mask_and_a_nan_to_fill_with_are_meant(tmp_path):
    assert load_model(with_constants(tmp_path / "m.pt2")).parameters == 0
