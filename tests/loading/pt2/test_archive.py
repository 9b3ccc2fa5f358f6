"""Code in an archive of torch.export, wherever torch.export.load looks, and claims of what is not there."""

import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.hostile import Bomb, assert_refused, export, rezip
from torch import nn

from asapc.errors import CheckpointError
from asapc.loading.model import load_model

GRAPH = "models/model.json"


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


def beside(name: str) -> Callable[[bytes], bytes]:
    """A maker of JSON with one entry more in front of those of an object."""
    return lambda whole: f"{{{name}, ".encode() + whole.strip()[1:]


@pytest.mark.parametrize("member", [GRAPH, "data/weights/model_weights_config.json"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda whole: b'{"a":' * 3000 + whole + b"}" * 3000, "nests too deeply"),
        (beside(f'"a": {"[" * 110}{"]" * 110}'), "nests too deeply"),
        (beside(f'"a": {"1" * 100_000}'), "more than 64 bits"),
        (beside(f'"a": -{2**64 + 1}'), "more than 64 bits"),
        (beside('"a": 1, "a": 2'), "'a' twice"),
        (beside('"a": NaN'), "holds NaN"),
        (beside('"a": -Infinity'), "holds -Infinity"),
        (beside('"a": 1e999'), "holds the number 1e999"),
    ],
)
def test_json_that_readers_may_take_differently_is_refused(member, change, why, whole, tmp_path):
    def changed(name: str, content: bytes) -> bytes:
        return change(content) if name == member else content

    message = assert_refused(CheckpointError, load_model, rezip(whole, tmp_path / "m.pt2", changed))
    assert f"{member} in " in message
    assert why in message


def test_infinity_in_a_graph_is_a_number_like_others(tmp_path):
    class Masked(nn.Module):
        def forward(self, x):
            return x.masked_fill(x < 0.5, float("-inf")).amax(-1)

    x = torch.rand(2, 3, 4)
    assert torch.equal(load_model(export(tmp_path / "m.pt2", Masked())).module(x), Masked()(x))


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
