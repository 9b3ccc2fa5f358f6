"""Whose costs a target stands for, and files of costs that do not fit it."""

import json

import pytest

from asapc.commands import target
from asapc.commands.target import cost_model
from asapc.config import CompileConfig
from asapc.errors import OptionError
from asapc.planning.costs import shipped, shipped_file
from asapc.types.costs import CostModel

CPU, GPU, HALF = shipped("cpu"), shipped("cuda", "float32"), shipped("cuda", "float16")


@pytest.fixture(params=[False, True], ids=["without a GPU", "with a GPU"])
def gpu(request, monkeypatch) -> bool:
    monkeypatch.setattr(target, "sees_gpu", lambda: request.param)
    return request.param


def test_a_target_names_the_costs_and_auto_takes_those_of_what_is_there(gpu):
    here = GPU if gpu else CPU
    expected = {"onnx": CPU, "cuda": GPU, "tensorrt": GPU, "tensorrt-rtx": GPU, "auto": here}
    assert {name: cost_model(CompileConfig(target=name)) for name in expected} == expected


def test_half_precision_has_costs_of_its_own_on_a_gpu_alone(gpu):
    for precision in ("float16", "bfloat16"):
        assert cost_model(CompileConfig(target="cuda", precision=precision)) == HALF
        assert cost_model(CompileConfig(target="onnx", precision=precision)) == CPU


def test_a_gpu_is_seen_by_torch_or_by_its_driver(monkeypatch, tmp_path):
    for torch_sees in (False, True):
        for file in (tmp_path, tmp_path / "none"):
            monkeypatch.setattr("torch.cuda.is_available", lambda torch_sees=torch_sees: torch_sees)
            monkeypatch.setattr(target, "FIRST_GPU", file)
            assert target.sees_gpu() == (torch_sees or file.exists())


def test_a_file_of_costs_is_read_whatever_there_is(gpu, tmp_path):
    path = tmp_path / "costs.json"
    content = json.loads(shipped_file("cuda", "float16").read_text())
    path.write_text(json.dumps(content | {"device": "mine"}))
    for name in ("auto", "cuda", "tensorrt-rtx"):
        model = cost_model(CompileConfig(costs=path, target=name, precision="bfloat16"))
        assert model == CostModel(**{**vars(HALF), "device": "mine", "file": path})


@pytest.mark.parametrize(
    ("carried", "options", "message"),
    [
        (("cpu", "float32"), {"target": "cuda"}, "has the costs of a CPU, and --target cuda plans for a GPU"),
        (("cpu", "float32"), {"target": "tensorrt"}, "has the costs of a CPU, and --target tensorrt plans for a GPU"),
        (("cuda", "float32"), {"target": "onnx"}, "has the costs of a GPU, and --target onnx plans for a CPU"),
        (("cuda", "float16"), {"target": "cuda"}, "has the costs of float16, and --precision is float32"),
        (("cuda", "float32"), {"precision": "bfloat16"}, "has the costs of float32, and --precision is bfloat16"),
    ],
)
def test_costs_of_another_device_or_precision_than_the_options_are_refused(carried, options, message, gpu):
    with pytest.raises(OptionError, match=message) as caught:
        cost_model(CompileConfig(costs=shipped_file(*carried), **options))
    assert "asapc costs" in caught.value.hint
