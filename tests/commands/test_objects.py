"""`asapc.compile` takes modules and arrays in memory, and options as keywords."""

import numpy as np
import pytest
import torch
from helpers.quick import quick_compilation
from torch.utils.data import DataLoader

import asapc
from asapc.commands.objects import read_options
from asapc.commands.verify import verify_model
from asapc.config import CompileConfig
from asapc.errors import OptionError, SamplesError
from asapc.models.pointset import PointTransformer
from asapc.runtime.model import load

SIZES = {"width": 16, "heads": 2, "depth": 1, "iterations": 2}
QUICK = {"level": 1, "batches": 1, "seconds": 0.1, "threads": 1, "target": "onnx"}


@pytest.fixture(scope="module")
def points():
    return torch.randn(32, 24, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return PointTransformer(**SIZES)


@pytest.fixture(scope="module")
def report(teacher, points, tmp_path_factory):
    # By name, since labels alone could as well be the mask that the model takes.
    loader = DataLoader([({"points": of}, number % 10) for number, of in enumerate(points)], batch_size=5)
    out = tmp_path_factory.mktemp("objects") / "out"
    with quick_compilation():
        return asapc.compile(
            teacher, samples=loader, fidelity="output-error<=1e-3", out=out, samples_in_folder=3, **QUICK
        )


def test_a_module_and_a_loader_give_a_folder_and_its_report(report, teacher, points):
    assert report.data["verdict"]["passed"]
    assert report.data["budget"] == ["output-error<=0.001"]
    assert report.data["model"]["path"] == "<PointTransformer>"
    assert report.data["fidelity"]["metric"] is not None  # the loader's labels
    assert teacher.training  # left as it was
    (logits,) = load(report.folder)(points).values()
    with torch.no_grad():
        torch.testing.assert_close(logits, teacher.eval()(points), rtol=1e-3, atol=1e-3)
    assert len(np.load(report.folder / "samples.npz")["points"]) == 3


def test_it_is_verified_against_its_weights_in_a_file(report, teacher, points, tmp_path):
    torch.save(teacher.state_dict(), tmp_path / "weights.pt")
    np.savez(tmp_path / "later.npz", points=points.numpy())
    config = CompileConfig(model="asapc.models.pointset:PointTransformer", model_args=SIZES)
    verification = verify_model(report.folder, tmp_path / "later.npz", tmp_path / "weights.pt", config)
    assert verification.verdict.passed


def test_without_its_weights_it_says_what_to_give(report, points, tmp_path):
    np.savez(tmp_path / "later.npz", points=points.numpy())
    with pytest.raises(OptionError) as caught:
        verify_model(report.folder, tmp_path / "later.npz")
    assert "object" in str(caught.value)
    assert "--teacher" in caught.value.hint


def test_the_same_weights_give_the_same_file(report, teacher, points, point_model):
    """From a file or from memory, with the same samples in the same order."""
    _, compile_it = point_model
    from_file = compile_it(target="onnx", fidelity=("output-error<=1e-3",)).folder / "operator.safetensors"
    assert (report.folder / "operator.safetensors").read_bytes() == from_file.read_bytes()


@pytest.mark.parametrize("read", [asapc.tradeoffs, asapc.load_checkpoint])
def test_functions_of_a_path_refuse_other_types(read):
    refused = {"not a int": (5,), "not a NoneType": (None,), "config is a dict": ("x.pt", {"level": 1})}
    for message, arguments in refused.items():
        with pytest.raises(OptionError, match=message):
            read(*arguments)
    with pytest.raises(OptionError, match="on_event cannot be 3"):
        asapc.tradeoffs("x.pt", on_event=3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fidelty": "relc<=0.1"}, OptionError, "no option 'fidelty'"),
        ({"level": "two"}, OptionError, "-O cannot be 'two'"),
        ({"seconds": "long"}, OptionError, "--seconds cannot be 'long'"),
        ({"threads": True}, OptionError, "--threads cannot be True"),
        ({"fidelity": 0.98}, OptionError, "--fidelity cannot be 0.98"),
        ({"fidelity": "relc"}, OptionError, "cannot read the fidelity budget"),
        ({"out": 3}, OptionError, "--out cannot be 3"),
        ({"model": "package:factory"}, OptionError, "say how to read a file"),
        ({"calib": "samples.npz"}, OptionError, "both samples and calib"),
        ({"max_samples": 0}, OptionError, "max_samples cannot be 0"),
        ({"config": {"level": 1}}, OptionError, "config is a dict"),
        ({"samples": None}, SamplesError, "no samples"),
        ({"on_event": 3}, OptionError, "on_event cannot be 3"),
        ({"samples": CompileConfig()}, SamplesError, "are a CompileConfig"),
        ({"max_samples": 4}, SamplesError, "too few"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(options, error, message, teacher, points, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        asapc.compile(teacher, **{"samples": DataLoader(points, batch_size=4), **options})
    assert message in str(caught.value)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_options_come_as_keywords_in_place_of_those_of_a_config():
    base = CompileConfig(level=1, seed=5)
    assert read_options(base, {"level": 2}) == CompileConfig(level=2, seed=5)
    assert read_options(None, {"fidelity": "relc<=0.1", "batches": 8}) == CompileConfig(
        fidelity=("relc<=0.1",), batches=(8,)
    )
    assert read_options(None, {"fidelity": ["relc<=0.1", "agreement>=0.9"]}).fidelity == (
        "relc<=0.1",
        "agreement>=0.9",
    )
    with pytest.raises(OptionError) as caught:
        read_options(None, {"fidelty": 1})
    assert "fidelity?" in caught.value.hint


def test_the_public_names_are_listed_and_importing_them_is_left_to_their_use():
    assert dir(asapc) == sorted(asapc.__all__)
    assert {"compile", "accelerate", "load", "load_checkpoint", "tradeoffs"} <= set(dir(asapc))
