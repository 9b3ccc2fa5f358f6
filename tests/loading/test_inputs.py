"""Inputs reach the parameters of their names, whatever the forward looks like, and must be as a file says."""

from dataclasses import replace

import onnx
import pytest
import torch
from helpers.tolerances import FLOAT32, difference
from torch import nn
from torch.export import Dim

from asapc.backends.eager.runner import EagerRunner
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.capturing.capture import capture_code
from asapc.capturing.export import export
from asapc.commands.compile import compile_model
from asapc.commands.inspect import inspect_model
from asapc.config import CompileConfig
from asapc.errors import SamplesError
from asapc.loading.inputs import order_inputs, shape_options
from asapc.loading.model import load_model
from asapc.loading.samples import UNNAMED
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.record import record
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples
from asapc.writing.rewrite import rewrite

TOKENS, WIDTH = 6, 4


class Attention(nn.Module):
    """Sinkhorn attention with a bias; subclasses name the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3)

    def attend(self, x, factor, bias):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT
        scores = scores if factor is None else 5 * scores + factor
        scores = scores if bias is None else scores + bias
        for _ in range(4):
            scores = scores.log_softmax(-2).log_softmax(-1)
        return self.head((scores.exp() @ v).mean(1))


class Gap(Attention):
    def forward(self, x, factor=None, bias=None):
        return self.attend(x, factor, bias)


class KeywordOnly(Attention):
    def forward(self, *, bias, x):
        return self.attend(x, None, bias)


class Mixed(Attention):
    def forward(self, x, /, factor=None, *, bias=None):
        return self.attend(x, factor, bias)


class Defaults(Attention):
    def forward(self, bias=None, factor=None, x=None):
        return self.attend(x, factor, bias)


class Unnamed(Attention):
    """Takes what the samples hold, in their order."""

    def forward(self, *args, **kwargs):
        return self.attend(args[1], None, args[0])


class Rest(Attention):
    def forward(self, bias, *rest):
        return self.attend(*rest, None, bias)


class Keywords(Attention):
    def forward(self, **kwargs):
        return self.attend(kwargs["x"], kwargs.get("factor"), kwargs["bias"])


KINDS = [Gap, KeywordOnly, Mixed, Defaults, Unnamed, Rest, Keywords]


def given(count: int = 24) -> Samples:
    generator = torch.Generator().manual_seed(0)
    bias = 3 * torch.randn(count, TOKENS, TOKENS, generator=generator)
    return Samples({"bias": bias, "x": torch.randn(count, TOKENS, WIDTH, generator=generator)})


def loaded(kind: type[Attention], tmp_path) -> LoadedModel:
    torch.manual_seed(0)
    return LoadedModel(kind().eval(), tmp_path / "model.pt", "0" * 64, 0, None, None)


def expected(module: Attention, samples: Samples) -> torch.Tensor:
    with torch.no_grad():
        return module.attend(samples.inputs["x"], None, samples.inputs["bias"])


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_reach_the_parameters_of_their_names_everywhere(kind, tmp_path):
    model = loaded(kind, tmp_path)
    samples = order_inputs(model, given())
    wanted = expected(model.module, samples)
    graph = capture_code(model, given())
    assert list(graph.example.inputs) == list(samples.inputs)
    for module in (model.module, graph.program.module(), export(graph.program.module(), samples.inputs).module()):
        (actual,) = EagerRunner(module)(samples)
        assert difference(actual, wanted) < FLOAT32
    (site,) = find_sinkhorn(graph, samples[:2]).sites
    assert site.loop.half_steps == 8
    output = record(graph.program.module(), samples, {"linear_1"})["linear_1"]
    assert difference(output, wanted) < FLOAT32
    path = export_onnx(rewrite(graph, [site], {}), tmp_path / "model.onnx", {}).path
    assert [value.name for value in onnx.load(path).graph.input] == list(samples.inputs)
    for batch in (samples, samples[:1]):
        (actual,) = OnnxRuntimeRunner(path, 1)(batch)
        assert difference(actual, expected(model.module, batch)) < 10 * FLOAT32


class Nested(Attention):
    """Takes containers, as a data loader gives them."""

    def forward(self, batch, pair, bias=None):
        return self.attend(batch["x"] + batch["more"]["shift"] + pair[0], None, pair[1] + bias)


def test_containers_are_filled_by_dotted_names(tmp_path):
    model = loaded(Nested, tmp_path)
    x, square = torch.randn(4, 24, TOKENS, WIDTH), torch.randn(2, 24, TOKENS, TOKENS)
    named = {"bias": square[0], "pair.0": x[0], "pair.1": square[1], "batch.more.shift": x[1], "batch.x": x[2]}
    samples = order_inputs(model, Samples(named))
    assert list(samples.inputs) == ["batch.more.shift", "batch.x", "pair.0", "pair.1", "bias"]
    with torch.no_grad():
        wanted = model.module({"x": x[2], "more": {"shift": x[1]}}, (x[0], square[1]), square[0])
    graph = capture_code(model, Samples(named))
    for module in (model.module, graph.program.module()):
        assert difference(EagerRunner(module)(samples)[0], wanted) < FLOAT32
    (site,) = find_sinkhorn(graph, samples[:2]).sites
    path = export_onnx(rewrite(graph, [site], {}), tmp_path / "model.onnx", {}).path
    assert difference(OnnxRuntimeRunner(path, 1)(samples)[0], wanted) < 10 * FLOAT32
    with pytest.raises(SamplesError, match="the model's inputs are batch, pair"):
        order_inputs(model, Samples({"bias": square[0]}))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", [Gap, KeywordOnly])
def test_a_whole_compilation_binds_inputs_by_name(kind, tmp_path):
    torch.manual_seed(0)
    torch.save(kind().eval(), tmp_path / "model.pt")
    samples = given(32)
    torch.save(dict(samples.inputs), tmp_path / "samples.pt")
    config = CompileConfig(
        out=tmp_path / "out",
        calib=tmp_path / "samples.pt",
        unsafe_load=True,
        fidelity=("relc<=1",),
        batches=(1,),
        seconds=0.02,
        threads=1,
        level=1,
        target="onnx",
    )
    compile_model(tmp_path / "model.pt", config)
    module = torch.load(tmp_path / "model.pt", weights_only=False)
    (actual,) = OnnxRuntimeRunner(tmp_path / "out" / "model.onnx", 1)(samples)
    assert difference(actual, expected(module, samples)) < 1e-4


def test_names_that_the_forward_does_not_have_are_refused(tmp_path):
    x = torch.rand(2, TOKENS, WIDTH)
    for inputs in ({"x": x, "gamma": x}, {"bias": x}):
        with pytest.raises(SamplesError, match="the model's inputs are x, factor, bias"):
            order_inputs(loaded(Gap, tmp_path), Samples(inputs))


def test_keyword_arguments_may_have_any_name_but_need_one(tmp_path):
    class Anything(nn.Module):
        def forward(self, **kwargs):
            return kwargs["pair"][0] + kwargs["pair"][1] + kwargs["kwargs"]

    x = torch.rand(2, 3)
    model = loaded(Anything, tmp_path)
    graph = capture_code(model, Samples({"kwargs": x, "pair.0": x, "pair.1": x}))
    assert torch.equal(graph.program.module()(x, x, x), 3 * x)
    with pytest.raises(SamplesError, match="not named"):
        order_inputs(model, Samples({UNNAMED: x}))


def test_keyword_arguments_beside_parameters_take_no_other_names(tmp_path):
    class Swallows(nn.Module):
        def forward(self, x, **kwargs):
            return x

    with pytest.raises(SamplesError, match=r"the model's inputs are x$"):
        order_inputs(loaded(Swallows, tmp_path), Samples({"x": torch.rand(2, 3), "y": torch.rand(2, 3)}))


def test_an_array_without_a_name_goes_to_a_forward_without_names(tmp_path):
    assert list(order_inputs(loaded(Unnamed, tmp_path), Samples({UNNAMED: torch.rand(2, 3)})).inputs) == ["input"]


@pytest.fixture(params=["pt2", "onnx"])
def exported(request, tmp_path):
    """A model with the inputs x, ids and keep, exported without samples."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, x, ids, keep):
            return (x + self.embed(ids)) * keep.unsqueeze(-1)

    batch = Dim("batch")
    inputs = (torch.rand(2, 5, 4), torch.randint(0, 9, (2, 5)), torch.rand(2, 5) > 0.5)
    program = torch.export.export(Model().eval(), inputs, dynamic_shapes=({0: batch},) * 3)
    path = tmp_path / f"m.{request.param}"
    if request.param == "pt2":
        program.example_inputs = None
        torch.export.save(program, path)
    else:
        torch.onnx.export(program, dynamo=True, verbose=False, input_names=["x", "ids", "keep.1"]).save(path)
    return path


def fitting(path, **changes) -> Samples:
    inputs = {"x": torch.rand(3, 5, 4), "ids": torch.zeros(3, 5, dtype=torch.int64), "keep": torch.ones(3, 5).bool()}
    inputs |= changes
    if path.suffix == ".onnx":
        inputs["keep.1"] = inputs.pop("keep")
    return Samples(inputs)


def test_samples_that_fit_an_exported_model_are_put_in_its_order(exported):
    model = load_model(exported)
    samples = fitting(exported)
    backwards = Samples(dict(reversed(samples.inputs.items())))
    assert list(order_inputs(model, backwards).inputs) == list(samples.inputs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.rand(3, 5, 6)}, ["x is (3, 5, 6) torch.float32", "takes (batch, 5, 4) torch.float32"]),
        ({"x": torch.rand(3, 5)}, ["x is (3, 5) torch.float32", "(batch, 5, 4)"]),
        ({"x": torch.rand(3, 5, 4).half()}, ["torch.float16", "(batch, 5, 4) torch.float32"]),
        ({"ids": torch.rand(3, 5)}, ["ids is (3, 5) torch.float32", "(batch, 5) torch.int64"]),
    ],
)
def test_samples_that_an_exported_model_does_not_take_are_refused_with_what_it_takes(exported, changes, words):
    with pytest.raises(SamplesError) as caught:
        order_inputs(load_model(exported), fitting(exported, **changes))
    assert all(word in str(caught.value) for word in words)
    assert str(exported) in str(caught.value)


def test_without_samples_the_hint_holds_the_shapes_of_an_exported_model(exported):
    name = "keep.1" if exported.suffix == ".onnx" else "keep"
    options = f"--input-shape x=2,5,4:float32 --input-shape ids=2,5:int64 --input-shape {name}=2,5:bool"
    assert shape_options(load_model(exported)) == options
    with pytest.raises(SamplesError) as caught:
        inspect_model(exported)
    assert caught.value.hint.endswith(options)
    shapes = tuple(text for text in options.split() if "=" in text)
    assert inspect_model(exported, CompileConfig(input_shape=shapes)).sites == ()


def test_axes_that_a_file_leaves_open_are_for_the_user_to_fill_in(tmp_path):
    batch, tokens = Dim("batch"), Dim("tokens")
    program = torch.export.export(
        nn.Linear(4, 2).eval(), (torch.rand(2, 5, 4),), dynamic_shapes=({0: batch, 1: tokens},)
    )
    program.example_inputs = None
    torch.export.save(program, tmp_path / "m.pt2")
    model = load_model(tmp_path / "m.pt2")
    assert shape_options(model) == "--input-shape input=2,SIZE,4:float32"
    order_inputs(model, Samples({"input": torch.rand(3, 7, 4)}))
    with pytest.raises(SamplesError, match=r"\(batch, any, 4\)"):
        order_inputs(model, Samples({"input": torch.rand(3, 7, 5)}))


def test_of_code_the_hint_gives_an_example(tmp_path):
    assert shape_options(loaded(Gap, tmp_path)).startswith("--input-shape x=")


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


class OneOfTwo(nn.Module):
    def forward(self, scale=2.0, *, x):
        return x * scale


def test_an_array_without_a_name_is_the_only_input(tmp_path):
    values = torch.randn(4, 3)
    model = LoadedModel(nn.Linear(3, 2), tmp_path / "model.pt", "0" * 64, 0, None, None)
    assert list(order_inputs(model, Samples({UNNAMED: values})).inputs) == ["input"]
    assert list(order_inputs(replace(model, module=OneOfTwo()), Samples({UNNAMED: values})).inputs) == ["x"]
    with pytest.raises(SamplesError, match="one array without a name; the model's inputs are x, y"):
        order_inputs(replace(model, module=Two()), Samples({UNNAMED: values}))


def test_float64_becomes_what_the_model_computes_in_and_is_told(tmp_path):
    samples = Samples({"input": torch.randn(4, 3).double()}, torch.arange(4))
    model = LoadedModel(nn.Linear(3, 2), tmp_path / "model.pt", "0" * 64, 0, None, None)
    ordered = order_inputs(model, samples)
    assert ordered.inputs["input"].dtype == torch.float32
    assert ordered.cast == ordered[:2].cast == order_inputs(model, ordered).cast == ("input",)
    for module in (nn.Linear(3, 2).double(), nn.Identity()):
        kept = order_inputs(replace(model, module=module), samples)
        assert (kept.inputs["input"].dtype, kept.cast) == (torch.float64, ())
