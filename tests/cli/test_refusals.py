"""Bad input: one message, one hint, and nothing is written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import QUICK, assert_user_error, folder, run, samples, weights_alone, write_checkpoint, written

from asapc.planning.costs import shipped_file

STOPPING = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = x * self.scale
        for _ in range(9):
            x, before = x.cos(), x
            if (x - before).abs().max() < 0.5:
                break
        return x
"""


def test_a_model_that_stops_early_is_refused_where_that_is_asked_for():
    written(Path("stopping.py"), STOPPING.encode())
    torch.save({"scale": torch.ones(3)}, "weights.pt")
    np.savez("s.npz", x=np.random.default_rng(0).random((24, 3), dtype=np.float32))
    arguments = ("compile", "weights.pt", "--model", "stopping:Model", "--calib", "s.npz", *QUICK)
    error, hint = assert_user_error(run(*arguments, "--early-stop", "refuse"))
    assert "stopping.py:14" in error
    assert "--early-stop bound" in hint
    assert "no Sinkhorn attention" in assert_user_error(run(*arguments))[0]  # which is looked for later


def test_a_model_without_sinkhorn_exits_with_1_and_writes_nothing(tmp_path):
    softmax = write_checkpoint(tmp_path / "softmax.pt", iterations=0)
    for command in ("compile", "inspect"):
        error, hint = assert_user_error(run(command, softmax))
        assert "no Sinkhorn attention" in error
        assert f"`asapc inspect {softmax} --why`" in hint
    result = run("inspect", softmax, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["sites"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["softmax.pt"]


def truncated(path: Path, source: Path) -> Path:
    path.write_bytes(source.read_bytes()[:2000])
    return path


def pickled(path: Path) -> Path:
    class Runs:
        def __reduce__(self):
            return os.mkdir, ("marker",)

    torch.save({"format": "asapc.checkpoint/1", "model": Runs()}, path)
    return path


def without(path: Path, weight: str) -> Path:
    weights = dict(torch.load(write_checkpoint(path), weights_only=True)["state_dict"])
    del weights[weight]
    return write_checkpoint(path, state_dict=weights)


def with_nan() -> dict:
    images = np.zeros((24, 4, 4), dtype=np.float32)
    images[3, 2, 1] = np.nan
    return {"images": images}


# Each makes its files in the working directory and returns the arguments after `compile`, with a word of the message.
BAD_INPUTS = {
    "missing file": (lambda small: ["missing.pt"], "no such file"),
    "path below a file": (lambda small: [small / "model.pt"], "small.pt"),
    "folder": (lambda small: [folder(Path("model.pt"))], "folder"),
    "empty file": (lambda small: [written(Path("empty.pt"))], "empty"),
    "truncated file": (lambda small: [truncated(Path("half.pt"), small)], "damaged"),
    "no checkpoint": (lambda small: [written(Path("text.pt"), b"hello\n")], "text.pt"),
    "pickle that runs code": (lambda small: [pickled(Path("evil.pt"))], "run code"),
    "missing weights": (lambda small: [without(Path("part.pt"), "head.bias")], "head.bias"),
    "extra weights": (
        lambda small: [
            write_checkpoint(
                Path("more.pt"),
                state_dict={**torch.load(small, weights_only=True)["state_dict"], "surplus": torch.zeros(1)},
            )
        ],
        "surplus",
    ),
    "no samples": (lambda small: [write_checkpoint(Path("bare.pt"), calibration=None)], "calibration"),
    "missing samples": (lambda small: [small, "--calib", "missing.npz"], "no such file"),
    "samples of the wrong shape": (
        lambda small: [small, "--calib", samples(Path("s.npz"), shape=(5, 5))],
        "(24, 5, 5)",
    ),
    "samples of the wrong rank": (lambda small: [small, "--calib", samples(Path("s.npz"), shape=(16,))], "(24, 16)"),
    "samples of the wrong dtype": (lambda small: [small, "--calib", samples(Path("s.npz"), dtype=np.uint8)], "uint8"),
    "samples in float16": (lambda small: [small, "--calib", samples(Path("s.npz"), dtype=np.float16)], "float16"),
    "samples of another name": (lambda small: [small, "--calib", samples(Path("s.npz"), pixels=np.ones(24))], "pixels"),
    "samples with NaN": (lambda small: [small, "--calib", samples(Path("s.npz"), **with_nan())], "NaN"),
    "too few samples": (lambda small: [small, "--calib", samples(Path("s.npz"), count=5)], "too few"),
    "no samples at all": (lambda small: [small, "--calib", samples(Path("s.npz"), count=0)], "too few"),
    "labels that are no classes": (
        lambda small: [small, "--calib", samples(Path("s.npz"), labels=np.eye(24))],
        "labels",
    ),
    "labels that the model does not know": (
        lambda small: [small, "--calib", samples(Path("s.npz"), labels=np.full(24, 99))],
        "from 99 to 99, the model tells 3 classes apart",
    ),
    "unwritable output": (
        lambda small: [small, "--out", written(Path("file")) / "out"],
        "cannot write",
    ),
    "existing output": (lambda small: [small, "--out", folder(Path("mine"))], "exists"),
    "output that asapc did not write": (lambda small: [small, "--out", folder(Path("mine")), "--force"], "mine"),
    "output with too long a name": (lambda small: [small, "--out", "x" * 300], ""),
    "unknown budget": (lambda small: [small, "--fidelity", "beauty>=1"], "beauty"),
    "budget the wrong way round": (lambda small: [small, "--fidelity", "agreement<=1"], "agreement"),
    "budget that a shell has cut": (lambda small: [small, "--fidelity", "agreement"], "'agreement'"),
    "unknown rule": (lambda small: [small, "--early-stop", "maybe"], "maybe"),
    "unknown level": (lambda small: [small, "-O", "7"], "-O cannot be 7"),
    "negative slices": (lambda small: [small, "--slices", "-1"], "--slices cannot be -1"),
    "batch of none": (lambda small: [small, "--batch", "0"], "--batch cannot be 0"),
    "batch beyond memory": (lambda small: [small, "--batch", "10000000"], "--batch cannot be 10000000"),
    "no range": (lambda small: [small, "--dynamic", "seq=4"], "'seq=4'"),
    "threads beyond measure": (lambda small: [small, "--threads", "100000"], "threads"),
    "no time": (lambda small: [small, "--seconds", "0"], "seconds"),
    "missing options": (lambda small: [small, "--config", "missing.toml"], "missing.toml: no such file"),
    "unknown rule in the options": (
        lambda small: [small, "--config", written(Path("o.toml"), b'early_stop = "maybe"')],
        "maybe",
    ),
    "weights without a model": (lambda small: weights_alone(small)[:1], "which model"),
    "unknown model": (lambda small: [*weights_alone(small)[:2], "no_such_module:build"], "no_such_module"),
    "arguments that are no JSON": (lambda small: [*weights_alone(small)[:4], "{"], "arguments"),
    "arguments of another model": (lambda small: [*weights_alone(small)[:4], '{"colour": 1}'], "TypeError"),
    "unreadable input shape": (lambda small: [small, "--input-shape", "x"], "input shape"),
    "missing example inputs": (lambda small: [small, "--inputs", "missing.npz"], "missing.npz"),
    "missing costs": (lambda small: [small, "--costs", "missing.json"], "missing.json: no such file"),
    "damaged costs": (lambda small: [small, "--costs", written(Path("c.json"), b"{")], "cannot read c.json"),
    "costs of another version": (
        lambda small: [small, "--costs", written(Path("c.json"), b'{"schema": "asapc.costs/9"}')],
        "it is of version asapc.costs/9",
    ),
    "costs of other operators": (
        lambda small: [small, "--costs", written(Path("c.json"), b'{"schema": "asapc.costs/1", "milliseconds": {}}')],
        "it is about other operators",
    ),
    "costs of another device": (
        lambda small: [small, "--costs", shipped_file("cpu", "float32"), "--target", "cuda"],
        "has the costs of a CPU, and --target cuda plans for a GPU",
    ),
    "target that is not here": (lambda small: [small, "--target", "tensorrt"], "TensorRT"),
    "device": (lambda small: ["/dev/zero"], "regular"),
    "damaged ONNX": (lambda small: [written(Path("model.onnx"), b"x")], "damaged"),
    "unknown option": (lambda small: [small, "--config", written(Path("o.toml"), b"colour = 1")], "colour"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_gets_one_message_and_a_hint_and_nothing_is_written(name, small):
    make, word = BAD_INPUTS[name]
    arguments = make(small)
    before = sorted(Path.cwd().rglob("*"))
    error, hint = assert_user_error(run("compile", *QUICK, *arguments))
    assert word in error
    assert len(hint) > len("hint: ")
    assert sorted(Path.cwd().rglob("*")) == before  # hidden leftovers would show
    assert [path.name for path in small.parent.iterdir()] == ["small.pt"]


def test_inspect_refuses_bad_input_as_compile_does(small):
    for arguments in (["missing.pt"], [small, "--calib", "missing.npz"], [written(Path("empty.pt"))]):
        assert_user_error(run("inspect", *arguments))
