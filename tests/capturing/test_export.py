"""What torch.export needs two passes for, and what it does not."""

import logging
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from helpers.tolerances import FLOAT32, difference
from torch import Tensor, nn
from torch.export import ExportedProgram

from asapc.capturing.capture import capture_onnx
from asapc.capturing.export import export
from asapc.errors import AsapcError
from asapc.loading.model import load_model
from asapc.types.samples import Samples


class Everyday(nn.Module):
    """Casts, copies, dropout and slices by their length, as most models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.layer(x.float())).to(x.device)
        left, right = x.narrow(-1, 0, 3), x.narrow(-1, 3, 5).to(torch.float64)
        return (left.transpose(1, 2).contiguous().flatten(1) * right.mean((1, 2))[:, None]).type_as(x)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x
        y[:, 1:3] += 1
        return y.div_(3)


def test_code_that_most_models_have_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ExportedProgram, "run_decompositions")
    torch.manual_seed(0)
    module = Everyday().eval()
    program = export(module, {"x": torch.randn(2, 5, 8)})
    x = torch.randn(7, 5, 8)
    assert difference(program.module()(x), module(x)) < FLOAT32
    assert "dropout" not in str(program.graph)


def test_writes_in_place_become_operators() -> None:
    program = export(InPlace(), {"x": torch.randn(2, 5)})
    assert all(not node.target._schema.is_mutable for node in program.graph.nodes if node.op == "call_function")
    x = torch.randn(7, 5)
    assert difference(program.module()(x), InPlace()(x)) < FLOAT32


class Mismatched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x


def as_module(folder: Path) -> None:
    export(Mismatched(), {"x": torch.randn(2, 4)}, axes={"x": {}})


def as_onnx(folder: Path) -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        mismatched (float[batch, 4] x) => (float[batch, 4] y) { y = MatMul (x, x) }""")
    onnx.save(model, folder / "mismatched.onnx")
    samples = Samples({"x": torch.randn(2, 4)})
    capture_onnx(load_model(folder / "mismatched.onnx"), samples)


@pytest.mark.parametrize("capture", [as_module, as_onnx])
def test_what_the_refusal_says_torch_does_not_log_too(
    capture: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    with pytest.raises(AsapcError):
        capture(tmp_path)
    logger.removeHandler(caplog.handler)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
