"""Runs the command in this process, and makes files for it."""

import json
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner

from asapc.cli import app
from asapc.models.vit import VisionTransformer

QUICK = ("--batch", "1", "--seconds", "0.05", "--threads", "1")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_checkpoint(path: Path, iterations: int = 6, **changes) -> Path:
    """A small untrained model as a checkpoint: 16 tokens, one layer."""
    torch.manual_seed(0)
    args = {"size": 4, "classes": 3, "width": 8, "depth": 1, "heads": 2, "epsilon": 0.25, "iterations": iterations}
    content = {
        "format": "asapc.checkpoint/1",
        "model": "asapc.models.vit:VisionTransformer",
        "model_args": args,
        "state_dict": VisionTransformer(**args).state_dict(),
        "calibration": {"inputs": {"images": torch.rand(16, 4, 4)}},
        "held_out": {"inputs": {"images": torch.rand(8, 4, 4)}, "labels": torch.arange(8) % 3},
    }
    torch.save({name: value for name, value in (content | changes).items() if value is not None}, path)
    return path


def assert_user_error(result, code: int = 1) -> tuple[str, str]:
    """One message, one hint, no traceback; returns the two."""
    assert result.exit_code == code, result.stderr
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert (len(errors), len(hints)) == (1, 1), result.stderr
    # Nothing follows but the hint, so that neither message was broken into several lines.
    assert lines[-2:] == [errors[0], hints[0]]
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    return errors[0], hints[0]


def samples(path: Path, count: int = 24, shape: tuple[int, ...] = (4, 4), dtype=np.float32, **more) -> Path:
    images = np.random.default_rng(0).random((count, *shape)).astype(dtype)
    np.savez(path, **{"images": images, **more})
    return path


def written(path: Path, content: bytes = b"") -> Path:
    path.write_bytes(content)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def weights_alone(small: Path, name: str = "weights.pt") -> list[object]:
    """The weights of a checkpoint in a file of their own, and the options that name their model."""
    content = torch.load(small, weights_only=True)
    torch.save({"epoch": 3, "model": {f"module.{k}": v for k, v in content["state_dict"].items()}}, name)
    return [name, "--model", content["model"], "--model-args", json.dumps(content["model_args"])]
