"""Processes that torchrun starts fit what one fits alone."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.fitted import cached_teacher, sound
from helpers.paths import TESTS
from helpers.tolerances import difference

from asapc.errors import SamplesError
from asapc.models.vit import VisionTransformer
from asapc.ops.sliced_dual import SlicedDual
from asapc.planning.distributed import processes, several, share, total
from asapc.types.samples import Samples

ARGS = {"size": 4, "width": 16, "depth": 1, "heads": 2, "epsilon": 0.05, "iterations": 5}
SAME = 1e-6  # relative
FIT = """
import sys
import torch
from helpers.fitted import cached_teacher, sound
from asapc.planning.distributed import processes
with processes() as rank:
    params = cached_teacher(sound).calibrate(slices=2, closure_steps=2, pieces=3)
    torch.save((params.query_basis, params.key_basis, params.knots, *params.weights), f"{sys.argv[1]}/{rank}.pt")
"""


def torchrun(count, *args, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), *map(str, args)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_processes_fit_what_one_does(tmp_path):
    teacher = cached_teacher(sound)
    alone = teacher.calibrate(slices=2, closure_steps=2, pieces=3)
    inputs = [tensor.double() for tensor in teacher.inputs]
    expected = SlicedDual(alone).double()(*inputs)
    script = tmp_path / "fit.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n{FIT}")
    torchrun(2, script, tmp_path, cwd=tmp_path)
    for rank in range(2):
        query_basis, key_basis, knots, *weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert difference(query_basis, alone.query_basis) < SAME
        assert difference(key_basis, alone.key_basis) < SAME
        assert torch.equal(knots, alone.knots)
        # Weights of vectors that are nearly parallel may differ by more than what they make of them.
        params = replace(alone, query_basis=query_basis, key_basis=key_basis, weights=tuple(weights))
        assert difference(SlicedDual(params).double()(*inputs), expected) < SAME


def test_the_command_under_torchrun_writes_one_report(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(24, 4, 4)
    data = {
        "format": "asapc.checkpoint/1",
        "model": "asapc.models.vit:VisionTransformer",
        "model_args": ARGS,
        "state_dict": VisionTransformer(**ARGS).state_dict(),
        "calibration": {"inputs": {"images": images[:16]}},
        "held_out": {"inputs": {"images": images[16:]}},
    }
    torch.save(data, tmp_path / "model.pt")
    options = ("--seconds", "0.1", "--batch", "1", "--fidelity", "relc<=0.9", "--target", "onnx", "--json")
    stdout = torchrun(2, "-m", "asapc", "compile", "model.pt", *options, cwd=tmp_path)
    assert json.loads(stdout) == json.loads((tmp_path / "model.asap" / "report.json").read_text())


def test_more_processes_than_samples_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    token = several.set(True)
    try:
        with pytest.raises(SamplesError, match="8 processes cannot share 7 samples"):
            share(Samples({"x": torch.arange(7)}))
    finally:
        several.reset(token)


def test_without_torchrun_there_is_one_process_with_all_samples():
    samples = Samples({"x": torch.arange(5)})
    with processes() as rank:
        assert rank == 0
        assert share(samples) is samples
        sums = torch.ones(3)
        assert total(sums) is sums
