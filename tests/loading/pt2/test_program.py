"""Archives of torch.export: read without running what stands in them, wherever it stands."""

import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.hostile import Bomb, Tiny, assert_refused, export, hint_of, rezip
from helpers.tolerances import FLOAT32, difference
from torch import nn
from torch.export import Dim

from asapc.capturing.capture import capture
from asapc.config import CompileConfig
from asapc.errors import CheckpointError, OptionError
from asapc.loading.model import load_model
from asapc.loading.pt2.allowed import check_expression, check_operator, check_tree

GRAPH = "models/model.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("archive") / "tiny.pt2")


def test_an_archive_gives_the_program_and_its_sample_inputs(whole):
    module = Tiny()
    loaded = load_model(export(whole.with_name("own.pt2"), module.eval()))
    assert loaded.parameters == sum(p.numel() for p in module.parameters())
    assert loaded.example.inputs["x"].shape == (2, 3, 4)
    assert (loaded.calibration, loaded.held_out) == (None, None)
    graph = capture(loaded, loaded.example)
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
        seen, expected = loaded.module(ids[:size], keep[:size]), module(ids[:size], keep[:size])
        for name, value in expected.items():
            assert difference(seen[name], value) <= FLOAT32


def test_an_archive_of_a_gpu_is_read_on_the_cpu(whole, tmp_path):
    path = rezip(
        whole, tmp_path / "m.pt2", lambda name, content: content.replace(b'{"type": "cpu"', b'{"type": "cuda"')
    )
    assert b"cuda" in path.read_bytes()
    assert {p.device.type for p in load_model(path).module.parameters()} == {"cpu"}


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


# Code in an archive, wherever torch.export.load looks.


def in_graph(change: Callable[[dict, str], None]) -> Callable[[Path, Path, Path], None]:
    """A maker of archives whose graph is changed, given Python that creates the marker."""

    def make(whole: Path, path: Path, marker: Path) -> None:
        def changed(name: str, content: bytes) -> bytes:
            if name != GRAPH:
                return content
            graph = json.loads(content)
            change(graph, f"__import__('os').mkdir({str(marker)!r})")
            return json.dumps(graph).encode()

        rezip(whole, path, changed)

    return make


def guards(program: dict, code: str) -> None:
    program["guards_code"] = [f"{code} is None"]


def nodes(program: dict) -> list[dict]:
    return program["graph_module"]["graph"]["nodes"]


def input_name(program: dict, code: str) -> None:
    """Renames the input x, whose name is put into the source of forward as it is."""
    name = f"x=({code})"
    text = json.dumps(program["graph_module"]).replace('"name": "x"', json.dumps({"name": name})[1:-1])
    program["graph_module"] = json.loads(text)
    values = program["graph_module"]["graph"]["tensor_values"]
    values[name] = values.pop("x")


def operator(program: dict, code: str) -> None:
    node = nodes(program)[-1]
    node["target"] = "torch.os.mkdir"
    node["inputs"] = [{"name": "", "arg": {"as_string": code.split("'")[-2]}, "kind": 1}]


def expression(program: dict, code: str) -> None:
    for value in program["graph_module"]["graph"]["tensor_values"].values():
        for size in value["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = code


def tree(program: dict, code: str) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    context = {"default_factory_module": "evil_module", "default_factory_name": "x", "dict_context": []}
    signature["out_spec"] = json.dumps(
        [1, {"type": "collections.defaultdict", "context": json.dumps(context), "children_spec": []}]
    )


def output_name(program: dict, code: str) -> None:
    """Renames the result of a node, so that forward would assign to it."""
    name = nodes(program)[0]["outputs"][0]["as_tensor"]["name"]
    text = json.dumps(program["graph_module"]).replace(json.dumps(name), json.dumps("torch.load"))
    program["graph_module"] = json.loads(text)


def attribute(program: dict, code: str) -> None:
    """Renames a parameter, so that it would be set as an attribute of a class."""
    program["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = "__class__.forward"


def parameter(program: dict, code: str) -> None:
    spec = program["graph_module"]["signature"]["input_specs"][0]["parameter"]
    spec["parameter_name"] = f'a" + ({code}) + "'


def keys(program: dict, code: str) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = [f"x=({code})"]


def opaque(whole: Path, path: Path, marker: Path) -> None:
    config = {
        "config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}
    }
    changes = {
        "data/constants/model_constants_config.json": json.dumps(config).encode(),
        "data/constants/opaque_obj_0": pickle.dumps(Bomb(marker)),
    }
    rezip(whole, path, changes)


def pickled(folder: Path, content: object) -> bytes:
    torch.save(content, folder / "pickled.pt")
    return (folder / "pickled.pt").read_bytes()


def weight(whole: Path, path: Path, marker: Path) -> None:
    def changed(name: str, content: bytes) -> bytes:
        if name == "data/weights/weight_0":
            return pickled(path.parent, Bomb(marker))
        if name == "data/weights/model_weights_config.json":
            config = json.loads(content)
            next(iter(config["config"].values()))["use_pickle"] = True
            return json.dumps(config).encode()
        return content

    rezip(whole, path, changed)


def constant(whole: Path, path: Path, marker: Path) -> None:
    config = {"config": {"c": {"path_name": "tensor_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}
    changes = {
        "data/constants/model_constants_config.json": json.dumps(config).encode(),
        "data/constants/tensor_0": pickled(path.parent, Bomb(marker)),
    }
    rezip(whole, path, changes)


def sample(whole: Path, path: Path, marker: Path) -> None:
    rezip(whole, path, {"data/sample_inputs/model.pt": pickled(path.parent, ((Bomb(marker),), {}))})


def old_weights(whole: Path, path: Path, marker: Path) -> None:
    config = {"data/weights/model_weights_config.json": None}
    rezip(whole, path, {"data/weights/model.pt": pickled(path.parent, {"a": Bomb(marker)}), **config})


EVIL = {
    "sample inputs": sample,
    "pickled weight": weight,
    "pickled constant": constant,
    "opaque constant": opaque,
    "weights of an older torch": old_weights,
    "symbolic size": in_graph(expression),
    "operator": in_graph(operator),
    "name of an input": in_graph(input_name),
    "name of an argument": in_graph(keys),
    "name of a node": in_graph(output_name),
    "name of an attribute": in_graph(attribute),
    "name of a parameter": in_graph(parameter),
    "structure of the outputs": in_graph(tree),
}
# torch runs these while it loads the archive; the others while the program is built or run, or they break it.
RUN_BY_TORCH = ("sample inputs", "pickled weight", "pickled constant", "opaque constant", "symbolic size")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVIL)
def test_code_in_an_archive_is_refused_unrun(name, whole, tmp_path, monkeypatch):
    path, marker = tmp_path / "evil.pt2", tmp_path / "marker"
    (tmp_path / "evil_module.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    EVIL[name](whole, path, marker)
    assert_refused(CheckpointError, load_model, path)
    assert not marker.exists()
    if name in RUN_BY_TORCH:  # the payload is live
        with suppress(Exception):
            torch.export.load(path)
        assert marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_guards_are_dropped_unrun(whole, tmp_path):
    path, marker = tmp_path / "evil.pt2", tmp_path / "marker"
    in_graph(guards)(whole, path, marker)
    loaded = load_model(path)
    loaded.module(torch.rand(2, 3, 4))
    assert not marker.exists()
    with suppress(Exception):  # the payload is live
        torch.export.load(path).module()(torch.rand(2, 3, 4))
    assert marker.exists()


def test_native_libraries_and_extra_files_are_left_aside(whole, tmp_path):
    extra = {"data/aotinductor/model/evil.so": b"\x7fELF", "extra/notes.txt": b"text", "executorch/x": b"x"}
    assert load_model(rezip(whole, tmp_path / "m.pt2", extra)).parameters


@pytest.mark.parametrize("member", [GRAPH, "data/weights/model_weights_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"1" * 9999]
)
def test_json_that_is_no_graph_is_refused(member, content, whole, tmp_path):
    assert_refused(CheckpointError, load_model, rezip(whole, tmp_path / "m.pt2", {member: content}))


@pytest.mark.parametrize("size", [2**40, 2**62, 2**70, -1])
@pytest.mark.parametrize("empty", [False, True])
def test_a_weight_that_claims_more_than_it_holds_is_refused(size, empty, whole, tmp_path):
    def changed(name: str, content: bytes) -> bytes:
        if name.endswith("weights_config.json"):
            config = json.loads(content)
            meta = next(iter(config["config"].values()))["tensor_meta"]
            meta["sizes"], meta["strides"] = [{"as_int": size}], [{"as_int": 0}]
            return json.dumps(config).encode()
        return b"" if empty and name == "data/weights/weight_0" else content

    assert_refused(CheckpointError, load_model, rezip(whole, tmp_path / "m.pt2", changed))


def test_a_graph_that_asks_for_more_than_fits_into_memory_is_refused(tmp_path):
    class Huge(nn.Module):
        def forward(self, x):
            return x.sum() + torch.zeros(1).expand(2**40)[:3].sum() + x

    assert "memory" in assert_refused(CheckpointError, load_model, export(tmp_path / "m.pt2", Huge()))


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s0', positive=True, integer=True)",
        "Mul(Integer(4), Symbol('s0', positive=True, integer=True))",
        "Add(Pow(Symbol('s7'), Integer(2)), Integer(-1))",
        "FloorDiv(Symbol('s0'), Integer(2))",
        "Float('0.5', precision=53)",
    ],
)
def test_symbolic_sizes_pass(text):
    assert check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "Symbol('s0').__class__",
        "Symbol('s0;x')",
        "Symbol('s0', positive=print(1))",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "Pow(Pow(Symbol('s0'), Integer(9)), Integer(9))",
        "9**9**9",
        "Float('1', precision=1000000000)",
        "Float('1e999999999')",
        "Integer('__import__')",
        "[x for x in ()]",
        "lambda: 1",
        "(" * 999,
        "-" * 999 + "1",
        "Add(" * 300 + "1" + ")" * 300,
        "",
    ],
)
def test_what_is_no_symbolic_size_does_not(text):
    assert not check_expression(text)


def test_operators_of_tensors_pass_and_nothing_else_of_torch():
    for name in ("torch.ops.aten.add.Tensor", "torch.ops.aten.sym_size.int", "_operator.getitem", "torch.sym_max"):
        assert check_operator(name), name
    for name in (
        "torch.os.system",
        "torch.load",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.save.default",
        "torch.ops.aten.__class__.mro",
        "torch.ops.load_library",
        "torch.ops.aten.add",
        "torch.ops.higher_order.triton_kernel_wrapper_mutation",
        "torch._operator.add",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "math.__loader__.exec_module",
        "builtins.eval",
        "#ns:op",
        "",
    ):
        assert not check_operator(name), name


def test_structures_of_containers_pass_and_nothing_that_imports():
    leaf = {"type": None, "context": None, "children_spec": []}

    def spec(kind: str, context: object, *children: object) -> str:
        return json.dumps([1, {"type": kind, "context": context, "children_spec": list(children)}])

    assert check_tree(spec("builtins.tuple", "null", leaf))
    assert check_tree(spec("builtins.dict", '["a", "b"]', leaf, leaf))
    enum = json.dumps([{"__enum__": True, "fqn": "os:system", "name": "x"}])
    for text in (
        spec("builtins.dict", enum, leaf),
        spec("builtins.dict", json.dumps(["a=print(1)"]), leaf),
        spec("collections.defaultdict", "{}", leaf),
        spec("builtins.tuple", "null", spec("collections.defaultdict", "{}")),
        json.dumps([2, leaf]),
        "",
        "[" * 100_000,
    ):
        assert not check_tree(text), text[:100]
