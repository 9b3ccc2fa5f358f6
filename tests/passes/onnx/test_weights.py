"""Models without their weights, and with made-up ones."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.passes.onnx.weights import tensors, with_made_up_weights, without_weights
from asapc.types.samples import Samples


def constant(name: str, values: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(values, name)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """Weights at the top, in a constant's node and in a branch; indices, a mask and a factor."""
    draw = np.random.default_rng(0)
    weights = {name: draw.normal(0.5, 2, (48, 48)).astype(np.float32) for name in ("top", "node", "branch")}
    mask = np.where(draw.random((48, 48)) < 0.5, 0, -np.inf).astype(np.float32)
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["masked", "branch"], ["then"])],
        "then",
        [],
        [helper.make_tensor_value_info("then", TensorProto.FLOAT, None)],
        [constant("branch", weights["branch"])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["masked"], ["otherwise"])],
        "else",
        [],
        [helper.make_tensor_value_info("otherwise", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Constant", [], ["node"], value=constant("node", weights["node"])),
        helper.make_node("MatMul", ["x", "top"], ["one"], doc_string="at line 3"),
        helper.make_node("MatMul", ["one", "node"], ["two"]),
        helper.make_node("Add", ["two", "mask"], ["three"]),
        helper.make_node("Mul", ["three", "factor"], ["four"]),
        helper.make_node("Gather", ["four", "order"], ["masked"], axis=1),
        helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [48, 48])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            constant("top", weights["top"]),
            constant("mask", mask),
            constant("factor", np.float32([0.25])),
            constant("order", np.arange(48)[::-1].copy()),
            constant("yes", np.array(True)),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors(model)}


def test_weights_are_gone_and_all_else_stays(model):
    bare = without_weights(model)
    sizes = {tensor.name: len(tensor.raw_data) for tensor in tensors(bare)}
    assert {name for name, size in sizes.items() if size == 0} == {"top", "node", "branch"}
    assert len(bare.SerializeToString()) < len(model.SerializeToString()) / 2
    assert "line 3" not in str(bare)
    assert len(values(model)["top"]) == 48  # the model itself is as it was


def test_made_up_weights_are_like_the_models_and_always_the_same(model):
    bare = without_weights(model)
    first, second, own = values(with_made_up_weights(bare)), values(with_made_up_weights(bare)), values(model)
    for name, array in own.items():
        np.testing.assert_array_equal(first[name], second[name])
        assert (first[name].dtype, first[name].shape) == (array.dtype, array.shape)
        if name in ("top", "node", "branch"):
            assert not np.array_equal(first[name], array)
            assert first[name].mean() == pytest.approx(array.mean(), abs=0.2)
            assert first[name].std() == pytest.approx(array.std(), rel=0.1)
        else:
            np.testing.assert_array_equal(first[name], array)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats(dtype):
    graph = helper.make_graph([], "graph", [], [], [constant("w", np.full((40, 40), 0.5, dtype))])
    (tensor,) = values(with_made_up_weights(without_weights(helper.make_model(graph)))).values()
    assert (tensor.dtype, tensor.shape) == (dtype, (40, 40))
    assert (tensor == 0.5).all()


def test_the_model_runs_with_them(model, tmp_path):
    onnx.save(with_made_up_weights(without_weights(model)), tmp_path / "model.onnx")
    (output,) = OnnxRuntimeRunner(tmp_path / "model.onnx", 1)(Samples({"x": torch.ones(48, 48)}))
    assert output.shape == (48, 48)
