"""`asapc.accelerate`: operators in the place of the loops, in a module that behaves as the model's."""

import copy
import io
from typing import NamedTuple

import pytest
import torch
from torch import nn

import asapc
from asapc.errors import FidelityError, InputError, NoSinkhornError, OptionError
from asapc.models.pointset import PointTransformer
from asapc.writing.accelerated import GRAPH

OPTIONS = {"batches": 1, "threads": 1, "no_cache": True}


class Result(NamedTuple):
    logits: torch.Tensor
    plan: torch.Tensor


class Styled(nn.Module):
    """Keys that may be padded, an argument that changes nothing here, dropout, a table made anew, and tied weights."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3, bias=False)
        self.tied = self.head
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("offset", torch.rand(8))
        self.table = torch.rand(8)  # neither a parameter nor a buffer
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, mask=None, scale: float = 1.0, names=()):
        steps = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        x = x + self.offset + self.table + 0.01 * torch.sin(steps)[:, None]
        scores = self.queries(x) @ self.keys(x).mT * (scale / 8**0.5)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -1e9)
        plan = scores
        for _ in range(6):
            plan = plan - plan.logsumexp(-2, keepdim=True)
            plan = plan - plan.logsumexp(-1, keepdim=True)
        plan = plan.exp()
        x = self.dropout(plan @ x)
        return Result(self.norm(self.tied(x.mean(1))), plan)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Styled().train()


@pytest.fixture(scope="module")
def x():
    return torch.randn(40, 12, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def fast(model, x):
    return asapc.accelerate(model, x, level=1, fidelity="output-error<=1e-3", **OPTIONS)


def outputs(module, *args, **kwargs):
    with torch.no_grad():
        return module(*args, **kwargs)


def test_it_returns_what_the_model_returns_in_evaluation(fast, model, x):
    teacher = copy.deepcopy(model).eval()
    for batch in (1, 7, 40):
        result, expected = outputs(fast, x[:batch]), outputs(teacher, x[:batch])
        assert isinstance(result, Result)
        torch.testing.assert_close(tuple(result), tuple(expected), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(outputs(fast, x=x).logits, outputs(fast, x).logits)
    assert outputs(fast, x, None, scale=1.0, names=()).logits.shape == (40, 3)  # all at their defaults


def test_the_loops_are_gone(fast, model):
    calls = [str(node.target) for node in getattr(fast, GRAPH).graph.nodes]
    assert not any("logsumexp" in call for call in calls)
    assert sum(call.startswith("asapc_") for call in calls) >= 1


def test_the_model_stays_as_it_was(fast, model, x):
    assert model.training
    assert fast.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fast.parameters()}


def test_train_sets_flags_alone(fast, x):
    before = outputs(fast.eval(), x).logits
    torch.testing.assert_close(outputs(fast.train(), x).logits, before, rtol=0, atol=0)  # no dropout
    assert fast.dropout.training
    torch.testing.assert_close(outputs(fast, x).logits, before, rtol=0, atol=0)  # statistics of before


def test_state_dicts_pass_from_one_to_the_other(fast, model, x):
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in model.named_parameters()]
    trained = copy.deepcopy(model)
    for parameter in trained.parameters():
        parameter.data += 0.05
    student = copy.deepcopy(fast)
    student.load_state_dict(trained.state_dict())
    expected = outputs(trained.eval(), x)
    torch.testing.assert_close(tuple(outputs(student, x)), tuple(expected), rtol=1e-3, atol=1e-4)
    student.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(outputs(student, x).logits, outputs(fast, x).logits, rtol=0, atol=0)
    trained.load_state_dict(student.state_dict())


def test_copies_and_pickles_are_the_same_and_apart(fast, x):
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        torch.testing.assert_close(outputs(other, x).logits, outputs(fast, x).logits, rtol=0, atol=0)
        other.head.weight.data.zero_()
        assert (outputs(other, x).logits - outputs(fast, x).logits).abs().max() > 0


def test_gradients_are_those_of_the_model(fast, model, x):
    teacher, student = copy.deepcopy(model).eval(), copy.deepcopy(fast)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, points in zip((teacher, student), inputs, strict=True):
        module(points).logits.square().sum().backward()
    for (name, one), (_, other) in zip(teacher.named_parameters(), student.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-2, atol=1e-3, msg=name)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-2, atol=1e-3)


def test_it_is_trained_further(fast, x):
    student, aim = copy.deepcopy(fast), torch.randn(40, 3)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = (student(x).logits - aim).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_torch_compile_takes_it_whole(fast, x):
    compiled = torch.compile(copy.deepcopy(fast), backend="aot_eager", fullgraph=True)
    for batch in (3, 5):
        torch.testing.assert_close(outputs(compiled, x[:batch]).logits, outputs(fast, x[:batch]).logits)


def test_it_moves_to_another_device_with_all_that_its_graph_makes(fast, x):
    moved = copy.deepcopy(fast).to("meta")
    result = moved(x.to("meta"))
    assert result.logits.device.type == "meta"
    assert {tensor.device.type for tensor in getattr(moved, GRAPH).buffers()} <= {"meta"}


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.half, lambda module: module.to(torch.bfloat16)])
def test_another_dtype_is_refused_and_changes_nothing(change, fast, x):
    other = copy.deepcopy(fast)
    with pytest.raises(OptionError, match="float32"):
        change(other)
    torch.testing.assert_close(outputs(other, x).logits, outputs(fast, x).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda fast, x: fast(), "x is missing"),
        (lambda fast, x: fast(x.numpy()), "x is a ndarray"),
        (lambda fast, x: fast(x, x=x), "x is given by position and by name"),
        (lambda fast, x: fast(x[0]), "x is (12, 8); the model takes (batch, 12, 8) float32"),
        (lambda fast, x: fast(x[:, :5]), "x is (40, 5, 8)"),
        (lambda fast, x: fast(x.double()), "x is torch.float64"),
        (lambda fast, x: fast(x, torch.ones(40, 12, dtype=torch.bool)), "captured without mask"),
        (lambda fast, x: fast(x, scale=2.0), "captured without scale"),
        (lambda fast, x: fast(x, None, 1.0, (), 1), "5 arguments by position"),
    ],
)
def test_arguments_that_it_was_not_captured_with_are_refused(call, message, fast, x):
    with pytest.raises(InputError) as caught:
        call(fast, x)
    assert message in str(caught.value)
    assert caught.value.hint


def test_padding_and_open_lengths(model, x):
    mask = torch.arange(12)[None] < torch.randint(6, 13, (40, 1), generator=torch.Generator().manual_seed(2))
    fast = asapc.accelerate(model.eval(), {"x": x, "mask": mask}, level=1, dynamic="seq=4:32", **OPTIONS)
    teacher = copy.deepcopy(model).eval()
    model.train()
    assert not fast.training
    for length in (6, 12, 30):
        points = torch.randn(3, length, 8)
        live = torch.arange(length)[None] < torch.tensor([length, length - 1, length - 2])[:, None]
        logits, expected = outputs(fast, points, mask=live).logits, outputs(teacher, points, live).logits
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="mask is missing"):
        fast(x)
    with pytest.raises(InputError, match="mask has 12 along seq, x has 11"):
        fast(x[:, :11], mask)


@pytest.mark.parametrize("lowering", ["materialised", "fused"])
def test_approximations_carry_gradients_to_the_scores(lowering):
    torch.manual_seed(0)
    teacher = PointTransformer(width=16, heads=2, depth=1, iterations=6)
    points = torch.randn(40, 24, 3)
    fast = asapc.accelerate(
        teacher, points, fidelity=("relc<=0.5", "agreement>=0"), lowering=lowering, operators="hinges", **OPTIONS
    )
    fast(points).square().sum().backward()
    teacher.eval()(points).square().sum().backward()
    ours = torch.cat([parameter.grad.flatten() for parameter in fast.parameters()])
    theirs = torch.cat([parameter.grad.flatten() for parameter in teacher.parameters()])
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95


def test_coefficients_of_operators_are_trained_alone(fast, x):
    torch.manual_seed(0)
    points = torch.randn(40, 24, 3)
    student = asapc.accelerate(
        PointTransformer(width=16, heads=2, depth=1, iterations=6),
        points,
        fidelity=("relc<=0.5", "agreement>=0"),
        operators="hinges",
        **OPTIONS,
    )
    before, state = outputs(student, points), student.state_dict()
    coefficients = student.operator_parameters()
    torch.testing.assert_close(outputs(student, points), before, rtol=0, atol=0)
    assert all(one is other for one, other in zip(coefficients, student.operator_parameters(), strict=True))
    assert len(student.state_dict()) == len(state) + len(coefficients)
    aim, optimizer = torch.randn(40, 10), torch.optim.Adam(coefficients, lr=0.1)
    losses = []
    for _ in range(20):
        loss = (student(points) - aim).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(student.state_dict()[name], value) for name, value in state.items())
    assert fast.operator_parameters() == []  # its operators are exact


def test_a_budget_that_is_missed_and_a_model_without_loops_are_errors(x):
    torch.manual_seed(0)
    teacher = PointTransformer(width=16, heads=2, depth=1, iterations=6)
    points = torch.randn(40, 24, 3)
    with pytest.raises(FidelityError):
        asapc.accelerate(teacher, points, fidelity="relc<=1e-6", operators="truncated", **OPTIONS)
    with pytest.raises(NoSinkhornError):
        asapc.accelerate(nn.Linear(8, 3), x, **OPTIONS)


def test_options_about_files_and_paths_are_refused(model, x, shipped):
    for options in ({"out": "folder"}, {"precision": "float16"}):
        with pytest.raises(OptionError, match="writes nothing"):
            asapc.accelerate(model, x, **options)
    with pytest.raises(OptionError, match="not a path"):
        asapc.accelerate(shipped)


def test_double_precision_stays(x):
    torch.manual_seed(0)
    teacher = Styled().double().eval()
    teacher.table = teacher.table.double()
    fast = asapc.accelerate(teacher, x.double(), level=1, fidelity="output-error<=1e-6", **OPTIONS)
    torch.testing.assert_close(outputs(fast, x.double()).logits, outputs(teacher, x.double()).logits)
