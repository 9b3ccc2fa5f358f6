"""Loops that stop early are captured at their bound, and said so."""

import math
import threading

import pytest
import torch
from helpers.slow import slow_beyond
from helpers.stopping import (
    BOUND,
    ROUNDING,
    SPELLINGS,
    Done,
    Loop,
    While,
    captured,
    half_steps,
    lines_with,
    output,
    scores,
)
from helpers.tolerances import difference
from torch import nn

from asapc.capturing.early_stop import Unconverged
from asapc.errors import CaptureError
from asapc.types.samples import Samples


@pytest.mark.parametrize("spelling", slow_beyond(SPELLINGS, 4))
def test_a_loop_is_captured_at_its_bound(spelling):
    samples = scores()
    stops, bound = Loop(SPELLINGS[spelling]), Loop(lambda *of: False)
    assert difference(output(stops, samples), output(bound, samples)) > 0.01
    graph = captured(stops, samples)
    assert difference(output(graph.program.module(), samples), output(bound, samples)) < ROUNDING
    asking = graph.early_stops.questions
    assert asking
    assert asking.keys() <= {*lines_with(f'    "{spelling}": lambda'), *lines_with("asks where a spelling")}
    assert all(f'"{spelling}"' in question or "converged" in question for question in asking.values())


@pytest.mark.parametrize("spelling", list(SPELLINGS)[::4])
def test_a_stop_that_is_never_reached_changes_nothing(spelling):
    graph = captured(Loop(SPELLINGS[spelling], tol=-1.0), early_stop="refuse")
    assert graph.early_stops.difference < ROUNDING
    assert not graph.early_stops.taken


class Stagnation(nn.Module):
    """Stops once the error, a Python number, no longer changes."""

    def forward(self, x):
        f, before = torch.zeros_like(x[..., :1]), float("inf")
        for _ in range(BOUND):
            f_old, f = f, half_steps(f, x)
            err = float((f - f_old).abs().max())
            if abs(before - err) < 0.5:
                break
            before = err
        return x + f


class History(nn.Module):
    """Writes errors into a tensor and asks that."""

    def forward(self, x):
        f, errors = torch.zeros_like(x[..., :1]), torch.zeros(BOUND)
        for i in range(BOUND):
            f_old, f = f, half_steps(f, x)
            errors[i] = (f - f_old).abs().max()
            if errors[i] < 0.5:
                break
        return x + f


class OneCell(nn.Module):
    """Writes the error into a tensor of one entry that is asked as a whole."""

    def forward(self, x):
        f, error = torch.zeros_like(x[..., :1]), torch.zeros(1)
        for _ in range(BOUND):
            f_old, f = f, half_steps(f, x)
            error[0] = (f - f_old).abs().max()
            if error < 0.5:
                break
        return x + f


class Checked(nn.Module):
    """Checks that numbers are in order, in the ways that people do, and stops early as well."""

    def forward(self, x):
        assert x.min() > -1e6, "scores out of range"
        assert torch.isfinite(x).all()
        f = torch.zeros_like(x[..., :1])
        for _ in range(BOUND):
            f_old, f = f, half_steps(f, x)
            if torch.isnan(f).any() or torch.isinf(f).any() or (f != f).any() or (f == float("inf")).any():
                f = f_old
                break
            if not torch.isfinite(f).all() or math.isnan(f.sum()) or not math.isfinite(f.max().item()):
                raise ValueError("not finite")
            if f"{(f - f_old).norm().item():.3f}" == "never":
                break
            if (f - f_old).abs().max() < 0.5:
                break
        return x + f


@pytest.mark.parametrize("kind", slow_beyond([While, Stagnation, Done, History, OneCell, Checked]))
def test_other_loops_are_captured_at_their_bound(kind):
    samples = scores()
    f = torch.zeros_like(samples.inputs["x"][..., :1])
    for _ in range(BOUND):
        f = half_steps(f, samples.inputs["x"])
    expected = samples.inputs["x"] + f
    assert difference(output(kind(), samples), expected) > 1e-3
    graph = captured(kind(), samples)
    assert difference(output(graph.program.module(), samples), expected) < ROUNDING
    assert graph.early_stops.taken
    assert difference(output(kind(), samples), expected) < 1


def test_the_size_of_the_difference_is_that_of_the_outputs_on_all_samples():
    samples = scores(count=70)  # in three batches, which stop one by one
    stops = Loop(SPELLINGS["item"], tol=0.5)
    graph = captured(stops, samples)
    expected = torch.cat([output(stops, batch) for batch in samples.batches(32)])
    actual = output(graph.program.module(), samples)
    assert graph.early_stops.taken
    assert graph.early_stops.difference == pytest.approx(difference(actual, expected), rel=1e-4)


def test_a_model_that_stops_earlier_is_refused_where_that_is_asked_for():
    with pytest.raises(CaptureError) as caught:
        captured(Loop(SPELLINGS["float"], tol=0.5), early_stop="refuse")
    (source,) = lines_with('    "float": lambda')
    graph = captured(Loop(SPELLINGS["float"], tol=0.5))
    assert source in str(caught.value)
    assert f"{graph.early_stops.difference:.1e}" in str(caught.value)
    assert "--early-stop bound" in caught.value.hint
    assert "\n" not in str(caught.value)


class Unbounded(nn.Module):
    def __init__(self, asks) -> None:
        super().__init__()
        self.asks = asks

    def forward(self, x):
        f, err = torch.zeros_like(x[..., :1]), torch.ones(())
        while self.asks(err):  # unbounded
            f_old, f = f, half_steps(f, x)
            err = (f - f_old).abs().max()
        return x + f


@pytest.mark.parametrize(
    "asks",
    [lambda err: err > 0.5, lambda err: err.item() > 0.5, lambda err: float(err) > 0.5],  # unbounded
)
def test_a_loop_without_a_bound_is_refused(asks, monkeypatch):
    monkeypatch.setattr("asapc.capturing.early_stop.MAX_ANSWERS", 2 * BOUND)
    with pytest.raises(CaptureError, match="no bound") as caught:
        captured(Unbounded(asks))
    assert any(line in str(caught.value) for line in lines_with("# unbounded", __file__))
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_many_layers_may_share_one_loop(monkeypatch):
    monkeypatch.setattr("asapc.capturing.early_stop.MAX_ANSWERS", BOUND)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Loop(SPELLINGS["bool"]) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    graph = captured(Layers())
    assert len(graph.early_stops.questions) == 1
    monkeypatch.setattr("asapc.capturing.early_stop.MAX_ANSWERS", BOUND - 1)
    with pytest.raises(CaptureError, match="no bound"):
        captured(Loop(SPELLINGS["bool"]))


def test_a_captured_loop_that_overflows_where_the_model_stops_is_refused():
    class Overflows(nn.Module):
        def forward(self, x):
            y = x.abs() + 1
            for _ in range(12):
                if y.max() > 1e3:  # always, were nothing ever to converge
                    y = y * y * 1e6
                else:
                    break
            return y

    with pytest.raises(CaptureError, match="NaN or infinity"):
        captured(Overflows(), Samples({"x": torch.rand(8, 3)}))


def test_infinite_outputs_of_both_are_no_difference():
    class Masked(Loop):
        def forward(self, x):
            plan = super().forward(x)
            return plan.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf), x * torch.nan

    graph = captured(Masked(SPELLINGS["bool"], tol=-1.0))
    assert graph.early_stops.difference < ROUNDING


def test_nothing_is_left_of_the_questions_in_the_graph():
    def names(module):
        return [(n.op, str(n.target)) for n in captured(module).program.graph.nodes]

    assert names(Loop(SPELLINGS["all"])) == names(Loop(lambda *of: False))


def test_nothing_is_answered_once_capture_has_ended_even_by_an_error():
    class Broken(Loop):
        def forward(self, x):
            y = super().forward(x)
            if torch.compiler.is_exporting():
                raise RuntimeError("broken on purpose")
            return y

    with pytest.raises(CaptureError, match="broken on purpose"):
        captured(Broken(SPELLINGS["bool"]))
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch.ones(()) < 2
    assert torch.ones(()).item() == 1.0
    assert torch.allclose(torch.ones(2), torch.ones(2))


def test_other_threads_get_true_answers_meanwhile():
    actual, running, stop = [], threading.Event(), threading.Event()

    def ask():
        while not stop.is_set():
            actual.append(bool(torch.ones(()) < 2) and float(torch.ones(())) == 1.0)
            running.set()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        running.wait()
        captured(Loop(SPELLINGS["item"]))
    finally:
        stop.set()
        thread.join()
    assert all(actual)


def test_outside_of_a_trace_the_mode_answers_nothing():
    with Unconverged(nn.Identity(), {}) as mode:
        assert torch.ones(()) < 2
        assert torch.ones(()).item() == 1.0
    assert mode.questions == {}
