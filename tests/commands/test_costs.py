"""`measure_costs`: what is timed, what is refused, and that the planner can read it."""

import json

import pytest
import torch

from asapc.commands import costs, target
from asapc.commands.costs import measure_costs
from asapc.config import CompileConfig
from asapc.errors import AsapcError
from asapc.events import StageDone
from asapc.loading.costs import read_costs
from asapc.planning.costs import Shape
from asapc.planning.trials import FEW_OPERATORS, FEW_SHAPES, operators

SMALL = (Shape(1, 2, 8, 6, 4), Shape(3, 2, 8, 6, 4))
ALL_KINDS = ("pairs, 0 steps", "softmax, fused")  # together they take all kinds of work


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A machine where torch sees no GPU."""
    monkeypatch.setattr(target, "sees_gpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_what_is_measured_can_be_read_as_costs(tmp_path, monkeypatch):
    written, events = [], []
    export = costs.export_onnx
    monkeypatch.setattr(costs, "export_onnx", lambda *args: written.append(args[1]) or export(*args))
    threads = torch.get_num_threads()
    data = measure_costs(CompileConfig(target="onnx", threads=1), events.append, SMALL, ALL_KINDS, 0.01)
    (tmp_path / "costs.json").write_text(json.dumps(data))
    model = read_costs(tmp_path / "costs.json")
    assert (model.name, data["threads"]) == ("cpu", 1)
    assert max(model.milliseconds.values()) > 0
    assert torch.get_num_threads() == threads
    # A file for each operator serves both batch sizes.
    assert len(written) == len(ALL_KINDS)
    lines = [event.detail for event in events if isinstance(event, StageDone)]
    assert lines == [f"2 operators at batch {batch}, 2 heads of 4, 8 x 6" for batch in (1, 3)]


def test_the_few_operators_and_shapes_are_among_those_there_are():
    for shape in FEW_SHAPES:
        assert set(FEW_OPERATORS) <= operators(shape.heads, shape.head_dim).keys()
    assert len(set(FEW_OPERATORS)) == len(FEW_OPERATORS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorrt"}, "costs cannot be measured for --target tensorrt"),
        ({"target": "tensorrt-rtx"}, "costs cannot be measured for --target tensorrt-rtx"),
        ({"target": "onnx", "precision": "float16"}, "costs cannot be measured for --precision float16"),
        ({"precision": "float16"}, "costs cannot be measured for --precision float16"),
        ({"target": "cuda", "precision": "bfloat16"}, "costs cannot be measured for --precision bfloat16"),
        ({"target": "cuda"}, "the costs of a GPU cannot be measured: torch sees none"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_what_cannot_be_measured_here_is_refused_before_anything_is(options, message, monkeypatch):
    monkeypatch.setattr(costs, "time_operators", None)
    with pytest.raises(AsapcError, match=message) as caught:
        measure_costs(CompileConfig(**options))
    assert "--target" in caught.value.hint or "--precision" in caught.value.hint
