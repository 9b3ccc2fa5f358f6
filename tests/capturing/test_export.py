"""What torch.export needs two passes for, and what it does not."""

import pytest
import torch
from helpers.tolerances import FLOAT32, difference
from torch import Tensor, nn
from torch.export import ExportedProgram

from asapc.capturing.export import export


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
