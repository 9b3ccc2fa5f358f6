"""Runs the command in this process."""

from pathlib import Path

import torch
from typer.testing import CliRunner

from asapc.cli import app
from asapc.models.vit import VisionTransformer


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_checkpoint(path: Path, iterations: int = 20, **changes) -> Path:
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
