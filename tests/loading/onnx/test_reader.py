"""Reading ONNX files: what others write in another way, what is refused, and damage."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.damage import DAMAGE, survive
from helpers.hostile import assert_refused
from helpers.onnx_files import looped, replaced, run_ort, tiny_file
from onnx import TensorProto, helper

from asapc.capturing.capture import capture_onnx
from asapc.capturing.compare import run
from asapc.capturing.onnx import check_memory
from asapc.errors import AsapcError, CheckpointError
from asapc.loading.model import load_model
from asapc.types.samples import Samples


def changed(folder: Path, change: object) -> Path:
    model = onnx.load(tiny_file(folder))
    change(model)
    (folder / "changed.onnx").write_bytes(model.SerializeToString())
    return folder / "changed.onnx"


def two_batches(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    model.graph.input.add(name="y").type.CopyFrom(model.graph.input[0].type)
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 3


def call_without_end(model: onnx.ModelProto) -> None:
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    for name, other in (("A", "B"), ("B", "A")):
        node = helper.make_node(other, ["u"], ["w"], domain="own")
        model.functions.append(helper.make_function("own", name, ["u"], ["w"], [node], opset))


def function_bomb(model: onnx.ModelProto) -> None:
    """Ten functions, each of which calls the next ten times over."""
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    model.opset_import.add(domain="own", version=1)
    for level in range(10):
        names = [f"w{i}" for i in range(11)]
        inner = ("Neg", "") if level == 9 else (f"F{level + 1}", "own")
        nodes = [helper.make_node(inner[0], [names[i]], [names[i + 1]], domain=inner[1]) for i in range(10)]
        model.functions.append(helper.make_function("own", f"F{level}", ["w0"], ["w10"], nodes, opset))
    model.graph.node.add(op_type="F0", domain="own", input=["x"], output=["unused"])


def read_each_other(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="Neg", input=["a"], output=["b"])
    model.graph.node.add(op_type="Neg", input=["b"], output=["a"])


def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.example"
    model.opset_import.add(domain="com.example", version=1)


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="NonZero", input=["x"], output=["where"], name="finder")


def old_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 9


def giant(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**40, 2**20]


def outside(location: str, target: str | None = None) -> object:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def noise(operator: str, nested: bool = False, **attributes: object) -> object:
    """A node that draws, maybe in a branch of an If."""

    def change(model: onnx.ModelProto) -> None:
        inputs = ["x"] if operator in ("Bernoulli", "Multinomial") or operator.endswith("Like") else []
        node = helper.make_node(operator, inputs, ["noise"], name="shaker", **attributes)
        if nested:
            result = helper.make_tensor_value_info("noise", TensorProto.FLOAT, None)
            branch = helper.make_graph([node], "branch", [], [result])
            model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
            node = helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch)
        model.graph.node.append(node)

    return change


@pytest.mark.parametrize(
    ("change", "operator"),
    [
        (noise("RandomNormal", shape=[3, 4]), "RandomNormal"),
        (noise("RandomUniform", shape=[3, 4]), "RandomUniform"),
        (noise("RandomNormalLike"), "RandomNormalLike"),
        (noise("RandomUniformLike", nested=True), "RandomUniformLike"),
        (noise("Bernoulli"), "Bernoulli"),
        (noise("Multinomial"), "Multinomial"),
    ],
)
def test_random_numbers_are_refused_with_their_node(change, operator, tmp_path):
    path = changed(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert f"shaker ({operator}) draws random numbers" in str(caught.value)
    assert "evaluation mode" in caught.value.hint


def dropping(folder: Path, inputs: str, training: int) -> Path:
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        dropping (float[batch, 6, 4] x) => (float[batch, 6, 4] y)
        <float half = {{0.5}}, float none = {{0.0}}, bool training = {{{training}}}>
        {{ y = Dropout ({inputs}) }}
    """)
    onnx.save(model, folder / "dropping.onnx")
    return folder / "dropping.onnx"


@pytest.mark.parametrize("inputs", ["x, half, training", "x, , training"])
def test_a_dropout_that_is_on_is_refused(inputs, tmp_path):
    samples = Samples({"x": torch.rand(2, 6, 4)})
    with pytest.raises(AsapcError, match="training mode") as caught:
        capture_onnx(load_model(dropping(tmp_path, inputs, training=1)), samples)
    assert "y (Dropout)" in str(caught.value)
    assert "evaluation mode" in caught.value.hint
    for quiet_inputs, training in ((inputs, 0), ("x, none, training", 1)):
        graph = capture_onnx(load_model(dropping(tmp_path, quiet_inputs, training)), samples)
        assert torch.equal(graph.program.module()(samples.inputs["x"])[0], samples.inputs["x"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (two_batches, "fixed batch"),
        (call_without_end, "call each other without end"),
        (function_bomb, "runs more than 16,384 nodes"),
        (read_each_other, "read each other"),
        (foreign_operator, "com.example"),
        (unknown_operator, "NonZero of the ONNX node finder"),
        (old_opset, "opset 9"),
        (giant, "its data is not"),
        (outside("/etc/passwd"), "leads out"),
        (outside("../secret"), "leads out"),
        (outside("link.bin"), "leads out"),
        (outside("missing.bin"), "no such file"),
        (outside(""), "leads out"),
    ],
)
def test_what_is_refused_and_why(change, why, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "secret").write_bytes(bytes(64))
    (tmp_path / "inner" / "link.bin").symlink_to(tmp_path / "secret")
    path = changed(tmp_path / "inner", change)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert why in str(caught.value)
    assert str(caught.value).isprintable()
    assert caught.value.hint.isprintable()


def give_defaults(model: onnx.ModelProto) -> None:
    """List all constants among the inputs, as files of before IR version 4 have to."""
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def reverse_nodes(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def into_functions(model: onnx.ModelProto) -> None:
    """Negate the input twice, by a function that calls another."""
    model.opset_import.add(domain="own", version=1)
    opset = list(model.opset_import)
    negate = helper.make_function("own", "Negate", ["u"], ["w"], [helper.make_node("Neg", ["u"], ["w"])], opset)
    call = [helper.make_node("Negate", [a], [b], domain="own") for a, b in (("u", "v"), ("v", "w"))]
    model.functions.extend([negate, helper.make_function("own", "Twice", ["u"], ["w"], call, opset)])
    for node in model.graph.node:
        node.input[:] = ["twice" if name == "x" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Twice", ["x"], ["twice"], domain="own"))


def fix_batch(size: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = size

    return change


@pytest.mark.parametrize(
    "change", [give_defaults, reverse_nodes, into_functions, fix_batch(1), fix_batch(-1), fix_batch(8)]
)
def test_a_file_that_others_write_in_another_way_is_the_same_model(change, tmp_path):
    path = changed(tmp_path, change)
    inputs = {"x": torch.rand(4, 3, 4)}
    loaded = load_model(path)
    assert loaded.module.input_names == ["x"]
    torch.testing.assert_close(loaded.module(inputs["x"]), load_model(tiny_file(tmp_path)).module(inputs["x"]))
    _, out = replaced(path, inputs)
    assert [value.name for value in onnx.load(out).graph.input] == ["x"]
    expected = run_ort(tmp_path / "tiny.onnx", inputs)[0]
    np.testing.assert_allclose(run_ort(out, inputs)[0], expected, rtol=1e-4)


def test_a_batch_that_is_part_of_the_graph_stays_fixed(tmp_path):
    def flatten_all(model: onnx.ModelProto) -> None:
        fix_batch(1)(model)
        model.graph.initializer.append(helper.make_tensor("shape", TensorProto.INT64, [3], [1, 3, 4]))
        for node in model.graph.node:
            node.input[:] = ["same" if name == "x" else name for name in node.input]
        model.graph.node.insert(0, helper.make_node("Reshape", ["x", "shape"], ["same"]))

    with pytest.raises(CheckpointError, match="fixed batch of 1") as caught:
        capture_onnx(load_model(changed(tmp_path, flatten_all)), Samples({"x": torch.rand(4, 3, 4)}))
    assert "dynamic batch" in caught.value.hint


def test_external_data_is_found_where_hubs_keep_it(tmp_path):
    """A snapshot's files are links into one folder, where files have other names."""
    model = onnx.load(tiny_file(tmp_path))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    onnx.save(model, tmp_path / "split.onnx", save_as_external_data=True, location="data.bin", size_threshold=0)
    for name, blob in (("split.onnx", "a1"), ("data.bin", "b2")):
        (tmp_path / name).rename(tmp_path / "blobs" / blob)
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / blob)
    inputs = torch.rand(2, 3, 4)
    whole, split = (load_model(tmp_path / name).module for name in ("tiny.onnx", "snapshot/split.onnx"))
    assert torch.equal(whole(inputs)[0], split(inputs)[0])


def test_external_data_without_a_length_is_the_rest_of_its_file(tmp_path):
    model = onnx.load(tiny_file(tmp_path))
    onnx.save(model, tmp_path / "split.onnx", save_as_external_data=True, location="data.bin", size_threshold=0)
    model = onnx.load(tmp_path / "split.onnx", load_external_data=False)
    tensors = sorted(model.graph.initializer, key=lambda t: int(t.external_data[1].value))
    for tensor, read in ((tensors[-1], True), (tensors[0], False)):
        del tensor.external_data[2]
        onnx.save(model, tmp_path / "split.onnx")
        if read:
            load_model(tmp_path / "split.onnx")
        else:
            assert "data.bin" in assert_refused(CheckpointError, load_model, tmp_path / "split.onnx")


def test_external_data_beside_the_file_is_read(tmp_path):
    model = onnx.load(tiny_file(tmp_path))
    onnx.save(model, tmp_path / "split.onnx", save_as_external_data=True, location="data.bin", size_threshold=0)
    inputs = torch.rand(2, 3, 4)
    whole, split = (load_model(tmp_path / name).module for name in ("tiny.onnx", "split.onnx"))
    assert torch.equal(whole(inputs)[0], split(inputs)[0])
    (tmp_path / "data.bin").write_bytes(b"short")
    assert_refused(CheckpointError, load_model, tmp_path / "split.onnx")


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_read_or_refused_in_one_line(seed, tmp_path):
    rng = random.Random(seed)
    whole = (tiny_file(tmp_path).read_bytes(), looped(tmp_path, 3).read_bytes())

    def read(path: Path) -> None:
        loaded = load_model(path)
        example = Samples({"x": torch.rand(2, 3, 4)})
        if loaded.module.input_names == ["x"]:
            check_memory(loaded.module, example)
            run(loaded.module, example, example)

    survived = sum(
        survive(tmp_path / "damaged.onnx", rng.choice(DAMAGE)(rng.choice(whole), rng), read) for _ in range(100)
    )
    assert survived < 100


def test_errors_of_reading_are_ours(tmp_path):
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "noise.onnx").write_bytes(b"\x00" * 100)
    for name in ("empty.onnx", "noise.onnx", "absent.onnx"):
        with pytest.raises(AsapcError):
            load_model(tmp_path / name)
