"""Padded forms of every kind, and small plans, built by NVIDIA's compiler.

`python -m benchmarks.builds` builds whole models.

Queries, keys and values come from one layer, as models have it: TensorRT-RTX crashed on that alone.
"""

import math
from dataclasses import dataclass

import onnx
import pytest
import torch
from helpers.slow import slow, slow_beyond
from torch import nn

from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.tensorrt import builder
from asapc.backends.tensorrt.builder import build_engine
from asapc.capturing.export import export
from asapc.errors import BuildError
from asapc.ops.amortised import AmortisedSinkhorn
from asapc.ops.features import pairs_of
from asapc.ops.guarded import GuardedSinkhorn
from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual, bias_side
from asapc.ops.small import SmallSinkhorn
from asapc.types.artifacts import OnnxArtifact
from asapc.types.choices import AmortisedParams, SlicedDualParams
from asapc.types.engine import EngineOptions
from asapc.types.graph import CapturedGraph, DynamicAxis
from asapc.types.samples import Samples
from asapc.types.site import Floor, Guard

WIDTH = 64


@dataclass(frozen=True)
class Shape:
    """Tokens, heads, and what the model is told of its padding: a mask or lengths."""

    tokens: int = 32
    heads: int = 4
    mask: str = "bool"

    @property
    def size(self) -> int:
        return WIDTH // self.heads


class Padded(nn.Module):
    """Attention on padded tokens: by an operator, or by the loop as people write it."""

    def __init__(self, shape: Shape, operator: nn.Module | None, half: bool) -> None:
        super().__init__()
        self.shape, self.operator, self.half_precision = shape, operator, half
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.shape.mask == "lengths":
            mask = torch.arange(x.shape[1]) < mask[:, None]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.shape.heads, -1)).permute(2, 0, 3, 1, 4)
        q = q / math.sqrt(self.shape.size)
        if self.half_precision:
            q, k, v = q.half(), k.half(), v.half()
        live = mask[:, None, None, :]
        if getattr(self.operator, "lowering", None) == "fused":
            y = self.operator.from_points(q, q, k, v, live.float())
        else:
            scores = (q @ k.transpose(-1, -2)).float().masked_fill(~live, -torch.inf)
            y = loop(scores, v) if self.operator is None else self.operator(scores, q, k, v)
        return self.out((y.float().transpose(1, 2).flatten(2) * mask[..., None]).sum(dim=1))


def loop(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sinkhorn in the log domain, which leaves wholly masked columns alone."""
    for _ in range(3):
        sums = scores.logsumexp(dim=-2, keepdim=True)
        scores = scores - sums.masked_fill(sums == -torch.inf, 0.0)
        scores = scores - scores.logsumexp(dim=-1, keepdim=True)
    return scores.exp() @ values.float()


def sliced_dual(shape: Shape, last: str = "rows", one_pass: bool = False, side: str = "keys", fused: bool = False):
    size, pieces, heads = shape.size, 3, shape.heads
    features = size + 1 + 2 * pairs_of(size).shape[-1] + 2 * pieces
    maps = 1 if one_pass else 2
    params = SlicedDualParams(
        query_basis=torch.randn(heads, size, size),
        key_basis=torch.randn(heads, size, size),
        slices=0,
        knots=torch.linspace(-1, 1, pieces).expand(heads, 2, -1),
        weights=tuple(0.1 * torch.randn(heads, features + number) for number in range(maps)),
        side=bias_side(last) if one_pass else side,
        paired=True,
        one_pass=one_pass,
    )
    return SlicedDual(params, last, masked=True, lowering="fused" if fused else "materialised")


ROWS = Guard(Floor(1e-6, False), Floor(1e-6, False), "plan", "first", "one", "same")
OPERATORS = {
    "as written": lambda shape: None,
    "exact": lambda shape: Sinkhorn(8, masked=True),
    "exact, odd": lambda shape: Sinkhorn(7, masked=True),
    "exact, levelled": lambda shape: Sinkhorn(8, masked=True, wide=True),
    "exact, on columns": lambda shape: Sinkhorn(6, "columns", masked=True),
    "exact, guarded": lambda shape: GuardedSinkhorn(6, "rows", ROWS, masked=True),
    "exact, fused": lambda shape: Sinkhorn(4, masked=True, lowering="fused"),
    "hinges": sliced_dual,
    "hinges, on columns": lambda shape: sliced_dual(shape, "columns"),
    "hinges of the queries": lambda shape: sliced_dual(shape, side="queries"),
    "hinges, fused": lambda shape: sliced_dual(shape, fused=True),
    "one pass": lambda shape: sliced_dual(shape, one_pass=True),
    "one pass, fused": lambda shape: sliced_dual(shape, one_pass=True, fused=True),
}
LENGTHS, WIDE_HEADS, ODD = Shape(mask="lengths"), Shape(heads=1), Shape(tokens=13, heads=16, mask="lengths")
FORMS = [
    ("exact", Shape(), "float32", False),
    ("exact", LENGTHS, "float16", False),
    ("exact", ODD, "float32", True),
    ("as written", LENGTHS, "float32", True),
    ("exact, levelled", WIDE_HEADS, "float32", False),
    ("exact, guarded", LENGTHS, "float32", False),
    ("exact, fused", Shape(), "float16", False),
    ("hinges", Shape(), "float32", True),
    ("hinges of the queries", LENGTHS, "float16", False),
    ("hinges, fused", Shape(), "float32", False),
    ("one pass", Shape(), "float32", False),
    ("one pass, fused", LENGTHS, "float16", False),
]
PRECISIONS = [("float32", False), ("float16", False), ("float32", True)]
# Each operator in each shape, in precisions such that every two of the three meet: a third of all combinations.
PAIRS = [
    (name, shape, *PRECISIONS[(row + column) % len(PRECISIONS)])
    for row, name in enumerate(OPERATORS)
    for column, shape in enumerate((Shape(), LENGTHS, WIDE_HEADS, ODD))
]
OTHERS = [slow(*form) for form in PAIRS if form not in FORMS]


@pytest.mark.parametrize(("name", "shape", "precision", "open_length"), [*FORMS, *OTHERS])
def test_a_padded_form_is_built(name, shape, precision, open_length, monkeypatch, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.manual_seed(0)
    lengths = torch.tensor([shape.tokens, shape.tokens // 2])
    mask = lengths if shape.mask == "lengths" else torch.arange(shape.tokens) < lengths[:, None]
    inputs = {"x": torch.randn(2, shape.tokens, WIDTH), "mask": mask}
    axes = None
    if open_length:
        batch, seq = DynamicAxis("batch", 1, 4), DynamicAxis("seq", 2, 300)
        axes = {"x": {0: batch, 1: seq}, "mask": {0: batch} | ({} if shape.mask == "lengths" else {1: seq})}
    module = Padded(shape, OPERATORS[name](shape), precision == "float16").eval()
    graph = CapturedGraph(export(module, inputs, axes), Samples(inputs), axes=axes)
    artifact = export_onnx(graph, tmp_path / "model.onnx", {}, standard=precision != "float32")
    engine = build_engine(artifact, tmp_path / "model.engine", 4, axes, "tensorrt-rtx", EngineOptions(("SM89",)))
    assert engine.targets == ("SM89",)


SWAP = "Transpose<perm=[0,2,1,3]>"
HALF = "h = Constant<value_float=0.5>() c = CastLike(h, x)"
# ONNX's own attention, and in which precision: what TensorRT-RTX crashes on or refuses as it stands.
ATTENTION = {
    "one tensor": ("float16", "y = Attention(x, x, z)"),
    "two names of one tensor": ("float16", "i = Relu(x) j = Relu(x) y = Attention(i, j, z)"),
    "a view of one tensor": ("float16", f"t = {SWAP}(x) k = {SWAP}(t) y = Attention(x, k, x)"),
    "scaled queries for keys": ("float16", f"{HALF} k = Mul(x, c) y = Attention(x, k, z)"),
    "float32": ("float", "y = Attention(x, z, z)"),
    "a cap on scores": ("float16", "y = Attention<softcap=5.0>(x, z, z)"),
}
NATIVE = "from asapc.backends.tensorrt import compiler as c; c.InlineAttention = c.UnfuseAttention; c.main()"


def build_attention(kind, body, folder):
    tensor = f"{kind}[b,2,16,16]"
    text = f"attention ({tensor} x, {tensor} z) => ({tensor} y) {{{body}}}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> {text}')
    onnx.save(model, folder / "model.onnx")
    artifact, path = OnnxArtifact(folder / "model.onnx", 23), folder / "model.engine"
    return build_engine(artifact, path, 4, None, "tensorrt-rtx", EngineOptions(("SM89",)))


@pytest.mark.parametrize("name", slow_beyond(ATTENTION, every=3))
def test_attention_of_the_standard_is_built_from_its_parts(name, monkeypatch, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kind, body = ATTENTION[name]
    engine = build_attention(kind, body, tmp_path)
    assert any(layer.attention for layer in engine.layers) == (kind == "float16" and "softcap" not in body)
    child = builder.CHILD
    monkeypatch.setattr(builder, "CHILD", child[: child.index("from asapc")] + NATIVE)
    with pytest.raises(BuildError):
        build_attention(kind, body, tmp_path)
    assert build_attention("float16", "y = Attention(x, z, z)", tmp_path).targets


class Mixer(nn.Module):
    """Streams that each token mixes by a small plan of its own, as hyper-connections do."""

    def __init__(self, lowering: str, half: bool, amortised: bool) -> None:
        super().__init__()
        guard = Guard(Floor(1e-6, False), Floor(1e-6, False), "plan", "plain", "one", "same")
        rest = "columns", (4, 4), guard, None, torch.ones(1), lowering
        self.operator = AmortisedSinkhorn(NETWORK, 3, *rest) if amortised else SmallSinkhorn(9, *rest)
        self.scores, self.out, self.half_precision = nn.Linear(4 * WIDTH, 16), nn.Linear(WIDTH, WIDTH), half

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.scores(x.flatten(2)).unflatten(-1, (4, 4))
        plan = self.operator.from_kernel(scores.softmax(dim=-1) + 1e-6)
        mixed = (plan.half() @ x.half()).float() if self.half_precision else plan @ x
        return self.out(mixed)


class Cross(nn.Module):
    """Attention to a context, whose keys and values are one projection, taken apart in the usual way."""

    def __init__(self, lowering: str) -> None:
        super().__init__()
        self.operator = Sinkhorn(3, lowering=lowering)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        heads = (2, WIDTH // 2)
        queries = x.unflatten(-1, heads).transpose(1, 2)
        keys, values = self.kv(context).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        if self.operator.lowering == "fused":
            return self.operator.from_points(queries, queries, keys, values)
        return self.operator((queries @ keys.mT).float(), queries, keys, values)


@pytest.mark.parametrize("half", [False, slow(True)])
@pytest.mark.parametrize("lowering", ["materialised", slow("fused")])
def test_keys_and_values_of_one_projection_are_built(lowering, half, monkeypatch, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kind = torch.float16 if half else torch.float32
    inputs = {"x": torch.randn(2, 6, WIDTH, dtype=kind), "context": torch.randn(2, 9, WIDTH, dtype=kind)}
    module = Cross(lowering).to(kind).eval()
    graph = CapturedGraph(export(module, inputs), Samples(inputs))
    artifact = export_onnx(graph, tmp_path / "model.onnx", {}, standard=half or lowering == "fused")
    engine = build_engine(artifact, tmp_path / "model.engine", 4, None, "tensorrt-rtx", EngineOptions(("SM89",)))
    assert engine.targets == ("SM89",)


MIXED = [
    slow("interleaved", "float16", True, False),
    ("interleaved", "float16", True, True),
    ("interleaved", "float32", False, False),
    slow("materialised", "float32", True, False),
    slow("materialised", "float32", True, True),
]
NETWORK = AmortisedParams(
    (torch.ones(8, 16), torch.ones(8, 8), torch.ones(4, 8)), (*2 * [torch.ones(8)], torch.ones(4))
)


@pytest.mark.parametrize(("lowering", "precision", "open_length", "amortised"), MIXED)
def test_small_plans_of_tokens_are_built(lowering, precision, open_length, amortised, monkeypatch, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    inputs = {"x": torch.randn(2, 6, 4, WIDTH)}
    axes = {"x": {0: DynamicAxis("batch", 1, 4), 1: DynamicAxis("seq", 2, 300)}} if open_length else None
    module = Mixer(lowering, precision == "float16", amortised).eval()
    graph = CapturedGraph(export(module, inputs, axes), Samples(inputs), axes=axes)
    artifact = export_onnx(graph, tmp_path / "model.onnx", {}, standard=precision != "float32")
    engine = build_engine(artifact, tmp_path / "model.engine", 4, axes, "tensorrt-rtx", EngineOptions(("SM89",)))
    assert engine.targets == ("SM89",)
