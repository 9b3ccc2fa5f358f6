"""Capture of models whose code asks questions of its data: at the bound of their loops, and said so."""

import math
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerances import difference
from torch import nn

from asapc.capturing.capture import EXAMPLE_BATCH, capture
from asapc.capturing.early_stop import Unconverged
from asapc.capturing.export import export
from asapc.errors import CaptureError, SamplesError
from asapc.loading.model import load_model
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples

BOUND = 6
ROUNDING = 1e-6  # float32, the same operations
HERE = __file__


def lines_with(text: str) -> list[str]:
    """Sources "file:line" of this file's lines that hold a text."""
    lines = enumerate(Path(HERE).read_text().splitlines(), 1)
    return [f"{HERE}:{number}" for number, line in lines if text in line and "lines_with" not in line]


def loaded(module: nn.Module) -> LoadedModel:
    return LoadedModel(module.eval(), Path("model.pt"), "0" * 64, 0, None, None)


def captured(module: nn.Module, samples: Samples | None = None, **options):
    return capture(loaded(module), scores() if samples is None else samples, **options)


def scores(count: int = 40) -> Samples:
    generator = torch.Generator().manual_seed(1)
    return Samples({"x": 3 * torch.randn(count, 5, 5, generator=generator)})


def output(module: nn.Module, samples: Samples) -> torch.Tensor:
    with torch.no_grad():
        return module(*samples.inputs.values())


def half_steps(f: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One iteration of log-domain Sinkhorn: the row potential after next."""
    g = -torch.logsumexp(x + f, dim=-2, keepdim=True)
    return -torch.logsumexp(x + g, dim=-1, keepdim=True)


class Loop(nn.Module):
    """Sinkhorn potentials until `converged` says so, at most BOUND times; `tol` of -1 never stops."""

    def __init__(self, converged, tol: float = 1e9) -> None:
        super().__init__()
        self.converged, self.tol = converged, tol

    def forward(self, x):
        f = torch.zeros_like(x[..., :1])
        for _ in range(BOUND):
            f_old, f = f, half_steps(f, x)
            if self.converged((f - f_old).abs().amax(), f, f_old, self.tol):  # asks where a spelling gives a tensor
                break
        return x + f


# Ways to ask whether to stop; all stop at once, given a large tolerance.
SPELLINGS = {
    "item": lambda err, f, old, tol: err.item() < tol,
    "bool": lambda err, f, old, tol: err < tol,
    "swapped": lambda err, f, old, tol: tol > err,
    "method": lambda err, f, old, tol: err.lt(tol),
    "function": lambda err, f, old, tol: torch.less_equal(err, tol),
    "tensor on the right": lambda err, f, old, tol: err < torch.tensor(tol),
    "float": lambda err, f, old, tol: float(err) < tol,
    "float of an item": lambda err, f, old, tol: float(err.item()) < tol,
    "not": lambda err, f, old, tol: not err > tol,
    "not any": lambda err, f, old, tol: not ((f - old).abs() > tol).any(),
    "all": lambda err, f, old, tol: ((f - old).abs() < tol).all(),
    "all, then item": lambda err, f, old, tol: ((f - old).abs() <= tol).all().item(),
    "torch.all": lambda err, f, old, tol: torch.all((f - old).abs().flatten(1).amax(1) < tol),
    "logical_not": lambda err, f, old, tol: torch.logical_not(err >= tol),
    "invert": lambda err, f, old, tol: ~(err >= tol),
    "any of a pair": lambda err, f, old, tol: (err < tol) | (f.abs().amax() < tol),
    "and": lambda err, f, old, tol: err.item() < tol and f.abs().max().item() < 2 * tol,
    "mean": lambda err, f, old, tol: (f - old).abs().mean().item() < tol,
    "max": lambda err, f, old, tol: torch.max(torch.abs(f - old)) < tol,
    "max of a dimension": lambda err, f, old, tol: (f - old).abs().flatten(1).max(dim=1).values.max() < tol,
    "norm": lambda err, f, old, tol: torch.linalg.vector_norm(f - old) < tol,
    "relative": lambda err, f, old, tol: (f - old).norm() < tol * old.norm() + tol,
    "relative, divided": lambda err, f, old, tol: err / max(f.abs().max().item(), 1e-9) < tol,
    "allclose": lambda err, f, old, tol: torch.allclose(f, old, atol=max(tol, 0), rtol=0) and tol > 0,
    "allclose, method": lambda err, f, old, tol: f.allclose(old, atol=max(tol, 0), rtol=0) and tol > 0,
    "isclose": lambda err, f, old, tol: torch.isclose(f, old, atol=max(tol, 0)).all() and tol > 0,
    "count": lambda err, f, old, tol: ((f - old).abs() >= tol).sum() == 0,
    "count, item": lambda err, f, old, tol: ((f - old).abs() < tol).sum().item() == f.numel(),
    "double": lambda err, f, old, tol: err.double().cpu().item() < tol,
    "detach": lambda err, f, old, tol: err.detach().data.item() < tol,
    "math": lambda err, f, old, tol: math.log(err.item() + 1e-30) < (math.log(tol) if tol > 0 else -1e9),
    "is_nonzero": lambda err, f, old, tol: torch.is_nonzero(err < tol),
    "equal": lambda err, f, old, tol: torch.equal(f * (tol < 0), old * (tol < 0)) and tol > 0,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
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


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_stop_that_is_never_reached_changes_nothing(spelling):
    graph = captured(Loop(SPELLINGS[spelling], tol=-1.0), early_stop="refuse")
    assert graph.early_stops.difference < ROUNDING
    assert not graph.early_stops.taken


class While(nn.Module):
    def forward(self, x):
        f, err, count = torch.zeros_like(x[..., :1]), 1e9, 0
        while err > 0.5 and count < BOUND:
            f_old, f = f, half_steps(f, x)
            err, count = (f - f_old).abs().max(), count + 1
        return x + f


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


class Done(nn.Module):
    """Remembers which samples are done, in place."""

    def forward(self, x):
        f, done = torch.zeros_like(x[..., :1]), torch.zeros(x.shape[0], dtype=torch.bool)
        for _ in range(BOUND):
            f_old, f = f, half_steps(f, x)
            done |= (f - f_old).abs().flatten(1).amax(1) < 0.5
            if done.all():
                break
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


@pytest.mark.parametrize("kind", [While, Stagnation, Done, History, OneCell, Checked])
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
    seen = output(graph.program.module(), samples)
    assert graph.early_stops.taken
    assert graph.early_stops.difference == pytest.approx(difference(seen, expected), rel=1e-4)


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
    assert any(line in str(caught.value) for line in lines_with("# unbounded"))
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


class Asks(nn.Module):
    """Does one thing or the other, by a question of its constants."""

    def __init__(self, question) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([0.5, 2.0]))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("mask", torch.tensor([True, False]), persistent=False)
        self.scale = torch.tensor(0.25)
        self.question = question

    def forward(self, x):
        return self.question(self, x)


CONSTANTS = {
    "bool of a buffer": lambda m, x: x * 2 if m.flag else x,
    "not of a buffer": lambda m, x: x * 2 if not m.flag else x,
    "item of a parameter": lambda m, x: x / m.temperature[0].item(),
    "float of a parameter": lambda m, x: x / float(m.temperature.mean()),
    "comparison of parameters": lambda m, x: x * 2 if m.temperature[0] > m.temperature[1] else x,
    "allclose of a parameter": lambda m, x: x * 2 if torch.allclose(m.temperature, torch.tensor([0.5, 2.0])) else x,
    "all of a mask": lambda m, x: x[..., :2] * m.mask if m.mask.all() else x,
    "any of a mask": lambda m, x: x[..., :2] * m.mask if m.mask.any() else x,
    "steps of a buffer": lambda m, x: sum(x.cos() for _ in range(int(m.steps))),
    "index by a buffer": lambda m, x: sum(x.cos() for _ in range(m.steps)),
    "item of an integer": lambda m, x: sum(x.cos() for _ in range(m.steps.item())),
    "list of a parameter": lambda m, x: sum(x * t for t in m.temperature.tolist()),
    "text of a parameter": lambda m, x: x * 2 if f"{m.temperature.max():.1f}" == "2.0" else x,
    "plain tensor": lambda m, x: x * 2 if m.scale < m.temperature.min() else x,
    "made in the forward": lambda m, x: x * 2 if torch.full((3,), 0.5).sum() > m.scale else x,
    "filled in place": lambda m, x: x * 2 if torch.empty(3).fill_(0.5).mul_(m.scale).sum() > 1 else x,
    "nan in a parameter": lambda m, x: x * 2 if torch.isnan(m.temperature).any() else x,
    "after a write of data elsewhere": lambda m, x: x * 2 if (x.clone().add_(1), m.scale < 1)[1] else x,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_questions_of_constants_are_answered_truthfully(name):
    module, samples = Asks(CONSTANTS[name]), scores()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    graph = captured(module, samples, early_stop="refuse")
    assert graph.early_stops is None
    seen, expected = output(graph.program.module(), samples), output(module, samples)
    assert seen.shape == expected.shape
    assert difference(seen, expected) < ROUNDING
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_tolerance_that_is_a_buffer_is_no_reason_to_stop():
    class Buffered(Loop):
        def __init__(self) -> None:
            super().__init__(lambda err, f, old, tol: err < tol * self.scale)
            self.register_buffer("scale", torch.tensor(2.0))

    graph = captured(Buffered())
    bound = Loop(lambda *of: False)
    assert difference(output(graph.program.module(), scores()), output(bound, scores())) < ROUNDING


class NumberOfData(nn.Module):
    """Uses a number that it read from its data, and asks nothing of it."""

    def forward(self, x):
        return x / x.abs().max().item()


def test_a_number_that_is_read_but_not_asked_about_stays_in_the_graph():
    samples = scores()
    graph = captured(NumberOfData(), samples)
    assert graph.early_stops is None
    for batch in (samples[:3], samples):
        assert difference(output(graph.program.module(), batch), output(NumberOfData(), batch)) < ROUNDING


def test_a_number_keeps_its_value_when_its_tensor_is_written_to():
    class Kept(nn.Module):
        def forward(self, x):
            largest = x.amax()
            before = largest.item()
            largest.mul_(2)
            return x * before + largest

    graph = captured(Kept())
    assert difference(output(graph.program.module(), scores()), output(Kept(), scores())) < ROUNDING


# Answers that would be true of the batch of the example only, or follow from nothing.
@pytest.mark.parametrize(
    "question",
    [
        lambda x: torch.arange(x.shape[0]).max() > 3,
        lambda x: torch.arange(x.shape[0]).max().item() > 3,
        lambda x: (x.long() == 0).any(),
        lambda x: x.flatten().argmax() > 2,
        lambda x: x.flatten().argmax().item() > 2,
        lambda x: torch.rand(3).argmax() > 1,
        lambda x: int(x.sum()) > 0,
    ],
)
def test_what_cannot_be_decided_is_refused(question):
    class Undecided(nn.Module):
        def forward(self, x):
            return x * 2 if question(x) else x

    with pytest.raises(CaptureError, match=r"torch\.export") as caught:
        captured(Undecided())
    assert "\n" not in str(caught.value)


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


class Ordinary(nn.Module):
    """Asks nothing; writes in place, draws constants, and branches on its own options."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 5), nn.LayerNorm(5)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.register_buffer("mask", torch.ones(5, 5).tril().bool())

    def forward(self, x):
        y = self.norm(self.layer(x)).masked_fill(~self.mask, 0.0)
        y /= y.norm(dim=-1, keepdim=True) + torch.tensor(1e-6)
        y[..., 0] = F.dropout(x, 0.1, self.training)[..., 0]
        return self.attention(y, y, y)[0] if y.shape[-1] == 5 else y


def dump(program) -> list[object]:
    return [
        str(program),
        [
            (str(node.meta.get("val")), node.meta.get("stack_trace"), node.meta.get("nn_module_stack"))
            for node in program.graph.nodes
        ],
        sorted(program.constants),
    ]


@pytest.mark.parametrize("kind", ["ordinary", "shipped"])
def test_a_model_that_asks_nothing_is_captured_as_without_all_this(kind, shipped):
    if kind == "ordinary":
        model, samples = loaded(Ordinary()), scores()
    else:
        model = load_model(shipped)
        samples = model.calibration
    graph = capture(model, samples)
    assert graph.early_stops is None
    assert dump(graph.program) == dump(export(model.module, samples[:EXAMPLE_BATCH].inputs))


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
    seen, running, stop = [], threading.Event(), threading.Event()

    def ask():
        while not stop.is_set():
            seen.append(bool(torch.ones(()) < 2) and float(torch.ones(())) == 1.0)
            running.set()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        running.wait()
        captured(Loop(SPELLINGS["item"]))
    finally:
        stop.set()
        thread.join()
    assert all(seen)


def test_outside_of_a_trace_the_mode_answers_nothing():
    with Unconverged(nn.Identity()) as mode:
        assert torch.ones(()) < 2
        assert torch.ones(()).item() == 1.0
    assert mode.questions == {}


def test_samples_that_the_model_refuses_are_named_by_all_their_shape():
    samples = scores(count=24)
    with pytest.raises(SamplesError, match=r"\(24, 5, 5\)"):
        captured(nn.LayerNorm(7), Samples({"input": samples.inputs["x"]}))


class Squeezes(nn.Module):
    """Forgets the batch where it is one."""

    def forward(self, x):
        row = x.sum(-1).squeeze()
        return x + row[:, None] if row.dim() > 1 else x + row[None, None] * 2


class Branches(nn.Module):
    def forward(self, x):
        return x * 2 if x.flatten(1).squeeze().dim() > 1 else x * 3


class SqueezesOutput(nn.Module):
    def forward(self, x):
        return x.sum(-1).squeeze()


class FailsForOne(nn.Module):
    def forward(self, x):
        return x.sum(-1).squeeze().unsqueeze(2)


@pytest.mark.parametrize("kind", [Squeezes, Branches, SqueezesOutput, FailsForOne])
def test_what_a_model_does_for_a_batch_of_one_alone_is_noticed(kind):
    with pytest.raises(CaptureError, match=r"batch of one|at batch 1") as caught:
        captured(kind())
    assert "batch of one" in caught.value.hint
    assert "\n" not in str(caught.value)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Short(nn.Module):
    """Its float16 and bfloat16 round what float32 would not."""

    def forward(self, x):
        return (x.bfloat16().cos() @ x.half().mT.bfloat16()).float()


@pytest.mark.parametrize("kind", [Noisy, Short, While, Done])
def test_noise_short_floats_and_early_stops_are_no_reason_to_refuse_a_batch_of_one(kind):
    assert captured(kind()).program is not None


class Returns(nn.Module):
    def __init__(self, more) -> None:
        super().__init__()
        self.more = more

    def forward(self, x):
        return self.more(x)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (lambda x: {"logits": x * 2, "n": 3}, ["['n']", "int"]),
        (lambda x: (x * 2, {"deep": [x, "text"]}), ["[1]['deep'][1]", "str"]),
        (lambda x: (x * 2, x.shape[0]), ["[1]", "int"]),
        (lambda x: 2.0, ["a graph can only return tensors: the model's output is of type float"]),
        (lambda x: None, ["returns nothing"]),
    ],
)
def test_outputs_that_are_no_tensors_are_refused_by_their_place(more, words):
    with pytest.raises(CaptureError) as caught:
        captured(Returns(more))
    assert all(word in str(caught.value) for word in words)
    assert caught.value.hint


def test_none_among_the_outputs_is_left_out():
    graph = captured(Returns(lambda x: {"logits": x * 2, "loss": None}))
    assert torch.equal(graph.program.module()(scores().inputs["x"])["logits"], 2 * scores().inputs["x"])
