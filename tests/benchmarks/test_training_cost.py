from subprocess import CompletedProcess

import pytest
import torch
from helpers.documents import tables

from benchmarks.study.step import Step, inputs, kernels, peak
from benchmarks.study.training_cost import claim, draw, section

NAMES = list(kernels())


def row(length: int, unfit: tuple[str, ...] = ()) -> dict:
    """A case in which each attention takes as many MB and ms as its place, times the length."""
    fit = [name for name in NAMES if name not in unfit]
    return {
        "length": length,
        "batch": 1,
        "heads": 4,
        "head_size": 64,
        "iterations": 20,
        "threads": 1,
        "rounds": 2,
        "bytes": {name: None if name in unfit else 1e6 * length * (NAMES.index(name) + 1) for name in NAMES},
        "ms": {name: float(length * (NAMES.index(name) + 1)) for name in fit},
        "times_loop": {name: [(NAMES.index(name) + 1) / 2, 0.25, 4.0] for name in fit if name != "Sinkhorn, log"},
    }


ROWS = {"1024 tokens": row(1024, ("64 slices",)), "256 tokens": row(256)}


def test_the_tables_go_by_length_and_say_what_does_not_fit():
    lines = list(section(ROWS))
    assert lines[0] == "## Training cost"
    memory, time = tables(lines)
    assert [cells[0] for cells in memory[1:]] == ["256", "1024"]
    assert memory[1][1:3] == ["256.0", "512.0"]
    assert memory[2][-1] == "does not fit"
    assert time[1][:3] == ["256", "512.0", "0.50 (0.25-4.00)"]
    assert time[2][-1] == ""


def test_the_claim_compares_most_slices_with_each_form_of_sinkhorn():
    told = claim(ROWS["256 tokens"])
    assert "takes 1792.0 MB." in told
    assert "in multiples: 3.5 (log), 2.3 (scaling), 1.8 (recompute)." in told
    assert claim(row(256, ("64 slices",))).endswith("were not measured.")


def test_the_figure_is_drawn(tmp_path):
    draw(ROWS, tmp_path)
    assert (tmp_path / "study-training_cost.png").stat().st_size > 10_000


def test_a_step_gives_the_gradients_of_queries_keys_and_values():
    samples = inputs(6)
    points = {name: value.clone().requires_grad_() for name, value in samples.inputs.items()}
    kernel = kernels()["softmax"]
    kernel(*points.values()).square().sum().backward()
    for gradient, point in zip(Step(kernel)(samples), points.values(), strict=True):
        torch.testing.assert_close(gradient, point.grad)


def test_the_memory_of_a_step_is_that_of_its_matrices():
    matrix = 4 * 1024**2 * 4  # of the scores of four heads
    size = peak("softmax", 1024)
    assert size is not None
    assert 2 * matrix < size < 12 * matrix


def test_a_step_that_does_not_fit_has_no_size():
    assert peak("softmax", 60_000) is None  # scores of 58 GB


def test_a_step_that_fails_for_another_reason_is_no_size(monkeypatch):
    failed = CompletedProcess([], 1, "", "KeyError: 8")
    monkeypatch.setattr("benchmarks.study.step.subprocess.run", lambda *args, **options: failed)
    with pytest.raises(RuntimeError, match="a step of softmax at 8 tokens failed: KeyError: 8"):
        peak("softmax", 8)
