"""Loops to marginals of their own: what the planner makes of them, as it runs in ONNX Runtime."""

from dataclasses import replace

import pytest
import torch
from helpers.tolerances import FLOAT32, difference
from torch import nn

from asapc.backends.eager.runner import EagerRunner
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.commands.study import study_module
from asapc.config import CompileConfig
from asapc.planning.alternatives import find_alternatives
from asapc.planning.check import Check
from asapc.planning.choose import decide
from asapc.planning.costs import shipped
from asapc.planning.operators import operators
from asapc.types.samples import Samples
from asapc.writing.rewrite import rewrite

TOKENS, EXPERTS, WIDTH = 20, 8, 12


class Dispatch(nn.Module):
    """Tokens of unequal weight are shared out among experts of unequal capacity, each with a key and a value."""

    def __init__(self, last):
        super().__init__()
        self.last, self.ask = last, nn.Linear(WIDTH, WIDTH, bias=False)
        self.experts, self.offers = nn.Linear(WIDTH, EXPERTS * WIDTH), nn.Linear(WIDTH, EXPERTS * WIDTH)
        weight, capacity = torch.linspace(0.5, 1.5, TOKENS), torch.linspace(1, 4, EXPERTS)
        self.register_buffer("weight", weight)
        self.register_buffer("capacity", capacity * weight.sum() / capacity.sum())

    def forward(self, tokens):
        context = tokens.mean(dim=1)
        keys, values = (f(context).view(-1, EXPERTS, WIDTH) for f in (self.experts, self.offers))
        log_plan = 2 * self.ask(tokens) @ keys.mT
        for step in range(9 if self.last == "rows" else 10):
            if step % 2:
                log_plan = log_plan - log_plan.logsumexp(dim=1, keepdim=True) + self.capacity.log()
            else:
                log_plan = log_plan - log_plan.logsumexp(dim=2, keepdim=True) + self.weight.log()[:, None]
        return log_plan.exp() @ values


@pytest.fixture(scope="module", params=["rows", "columns"])
def teacher(request):
    torch.manual_seed(0)
    tokens = torch.randn(64, TOKENS, WIDTH)
    teacher = study_module(Dispatch(request.param), Samples({"tokens": tokens[:48]}), Samples({"tokens": tokens[48:]}))
    [site] = teacher.sites
    assert (site.loop.last, site.loop.row_mass.numel(), site.loop.column_mass.numel()) == (
        request.param,
        TOKENS,
        EXPERTS,
    )
    return teacher


@pytest.mark.parametrize("kind", ["one-pass", "hinges"])
@pytest.mark.parametrize("lowering", ["materialised", "fused"])
def test_a_sliced_dual_of_marginals_of_their_own_runs_as_it_is_fitted(teacher, kind, lowering, tmp_path):
    config = CompileConfig(operators=kind, lowering=lowering, fidelity=("relc<=0.3",))
    selection = decide(Check(teacher, find_alternatives(teacher, config, shipped())), config)
    [site] = teacher.sites
    candidate = selection.choices[site.name].candidate
    assert candidate.operator == "sliced_dual"
    assert candidate.lowering == (lowering if site.loop.last == "rows" else "materialised")
    assert (candidate.half_steps == 1) == (kind == "one-pass")
    graph = rewrite(teacher.graph, teacher.sites, operators(teacher.sites, selection))
    runner = OnnxRuntimeRunner(export_onnx(graph, tmp_path / "model.onnx", {}).path)
    [actual], [expected] = runner(teacher.held_out), EagerRunner(graph.program.module())(teacher.held_out)
    assert difference(actual, expected) < FLOAT32
    [of_teacher] = EagerRunner(teacher.graph.program.module())(teacher.held_out)
    assert difference(actual, of_teacher) < 0.3


def test_masses_that_are_left_out_of_an_operator_show(teacher):
    """The estimate alone does not make up for them."""
    config = CompileConfig(operators="one-pass")
    selection = decide(Check(teacher, find_alternatives(teacher, config, shipped())), config)
    [site] = teacher.sites
    uniform = replace(site, loop=replace(site.loop, row_mass=torch.ones(1), column_mass=torch.ones(1)))
    [of_teacher] = EagerRunner(teacher.graph.program.module())(teacher.held_out)
    errors = []
    for of_site in (site, uniform):
        graph = rewrite(teacher.graph, [of_site], operators([of_site], selection))
        errors.append(difference(EagerRunner(graph.program.module())(teacher.held_out)[0], of_teacher))
    assert errors[0] < errors[1] / 2
