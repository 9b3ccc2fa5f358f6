"""The files that models come in, and the options that say how to read them."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.command import QUICK, assert_user_error, run, samples, weights_alone, written

from asapc.loading.model import load_model


def test_inspect_reads_weights_and_says_where_it_found_them_and_what_it_probes_with(small):
    result = run("inspect", *weights_alone(small), "--input-shape", "images=2,4,4")
    assert result.exit_code == 0, result.stderr
    assert "16 x 16" in result.stdout
    for words in ("'model'", "'module.'", "random inputs"):
        assert words in result.stderr
    result = run("inspect", *weights_alone(small), "--inputs", samples(Path("s.npz"), count=2))
    assert result.exit_code == 0, result.stderr
    assert "random" not in result.stderr


def test_compile_never_calibrates_on_random_inputs(small):
    for example in (["--input-shape", "images=2,4,4"], ["--inputs", samples(Path("s.npz"), count=64)]):
        error, hint = assert_user_error(run("compile", *weights_alone(small), *example, *QUICK))
        assert "calibration" in error
        assert "--calib" in hint


@pytest.mark.usefixtures("quick")
def test_compile_takes_weights_and_real_samples(small):
    result = run(
        "compile", *weights_alone(small), "--calib", samples(Path("s.npz"), count=64), "--target", "onnx", *QUICK
    )
    assert result.exit_code == 0, result.stderr
    assert "16 x 16" in result.stdout
    assert "'module.'" in result.stderr
    assert Path("weights.asap/model.onnx").is_file()


def archive(path: Path, small: Path, **options) -> Path:
    batch = torch.export.Dim("batch")
    module, example = load_model(small).module, (torch.rand(2, 4, 4),)
    torch.export.save(torch.export.export(module, example, dynamic_shapes=({0: batch},)), path)
    return path


@pytest.mark.usefixtures("quick")
def test_inspect_and_compile_take_an_exported_program(small):
    path = archive(Path("model.pt2"), small)
    result = run("inspect", path)
    assert result.exit_code == 0, result.stderr
    assert "16 x 16" in result.stdout
    assert "kernel.py:" in result.stdout
    result = run("compile", path, "--calib", samples(Path("s.npz"), count=64), "--target", "onnx", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert Path("model.asap/model.onnx").is_file()


def test_unsafe_load_warns_before_it_runs_anything(small):
    torch.save(load_model(small).module, "module.pt")
    error, hint = assert_user_error(run("inspect", "module.pt", "--input-shape", "images=2,4,4"))
    assert "run code" in error
    assert "--unsafe-load" in hint
    result = run("inspect", "module.pt", "--unsafe-load", "--input-shape", "images=2,4,4")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("warning: --unsafe-load runs code")


def test_inspect_takes_its_options_from_a_file_too(small):
    name, _, model, _, args = weights_alone(small)
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in json.loads(args).items())
    text = f'model = "{model}"\nmodel_args = {{{table}}}\ninput_shape = ["images=2,4,4"]\n'
    options = written(Path("o.toml"), text.encode())
    assert "--trust-config" in assert_user_error(run("inspect", name, "--config", options))[1]
    result = run("inspect", name, "--config", options, "--trust-config")
    assert result.exit_code == 0, result.stderr


@pytest.mark.usefixtures("quick")
def test_outputs_have_the_names_that_are_asked_for(small):
    result = run("compile", small, "--output-names", "classes", "--target", "onnx", *QUICK, "--fidelity", "relc<=1")
    assert result.exit_code == 0, result.stderr
    session = onnxruntime.InferenceSession("small.asap/model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["classes"]
    assert np.isfinite(session.run(["classes"], {"images": np.zeros((3, 4, 4), np.float32)})[0]).all()
    error, _ = assert_user_error(run("compile", small, "--output-names", "a,b", "--target", "onnx", *QUICK, "--force"))
    assert "2 names" in error
