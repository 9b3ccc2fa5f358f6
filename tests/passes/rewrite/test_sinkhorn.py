import pytest
import torch
from helpers.fitted import changed
from helpers.tolerances import FLOAT64, difference
from torch import nn

from asapc.capturing.export import export
from asapc.errors import CaptureError, InternalError
from asapc.ops.sinkhorn import Sinkhorn
from asapc.passes.base import PreconditionError
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.rewrite.sinkhorn import SITE_MARK, InLayout, RewriteSinkhorn, form_of
from asapc.planning.operators import exact_operator
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Operand
from asapc.writing.rewrite import rewrite

WIDTH, HEADS, TOKENS = 16, 2, 6


def log_domain(scores, half_steps):
    for i in range(half_steps):
        scores = scores - torch.logsumexp(scores, dim=-1 - i % 2, keepdim=True)
    return scores.exp()


def division_in_place(scores, half_steps):
    plan = scores.exp()
    for i in range(half_steps):
        plan /= plan.sum(dim=-1 - i % 2, keepdim=True)
    return plan


class Attention(nn.Module):
    def __init__(self, half_steps, style=log_domain):
        super().__init__()
        self.half_steps, self.style = half_steps, style
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        plan = self.style(3 * q @ k.transpose(-1, -2), self.half_steps)
        return x + (plan @ v).transpose(1, 2).flatten(2)


class Case:
    """A float64 model of two sites, one that ends on rows and one on columns, with an exact operator for each."""

    def __init__(self, style=log_domain):
        model = nn.Sequential(Attention(5, style), Attention(4, style)).double().eval()
        self.samples = Samples({"input": torch.randn(5, TOKENS, WIDTH, dtype=torch.float64)})
        self.graph = CapturedGraph(export(model, self.samples[:2].inputs), self.samples[:2])
        self.sites = find_sinkhorn(self.graph, self.samples).sites
        assert [(site.loop.half_steps, site.loop.last) for site in self.sites] == [(5, "rows"), (4, "columns")]
        self.operators = {site.name: exact_operator(site) for site in self.sites}
        self.module = self.graph.program.module()
        with torch.no_grad():
            self.expected = model(*self.samples.inputs.values())

    def run(self, module):
        with torch.no_grad():
            return module(*self.samples.inputs.values())


@pytest.fixture
def case():
    return Case()


def names(module):
    return [node.name for node in module.graph.nodes]


def calls(module, case):
    """The nodes that call the operators, in the order of the graph."""
    operators = list(case.operators.values())
    called = [node for node in module.graph.nodes if node.op == "call_module"]
    modules = {node: module.get_submodule(node.target) for node in called}
    return [node for node, module in modules.items() if isinstance(module, InLayout) and module.operator in operators]


def test_an_exact_operator_leaves_the_outputs_as_they_were(case):
    assert difference(case.run(case.module), case.expected) < FLOAT64
    result = RewriteSinkhorn(case.sites, case.operators)(case.module)
    assert len(calls(result.program, case)) == len(case.sites)
    assert difference(case.run(result.program), case.expected) < FLOAT64


def test_another_operator_changes_the_outputs(case):
    softmax = {site.name: Sinkhorn(1) for site in case.sites}
    result = RewriteSinkhorn(case.sites, softmax)(case.module)
    # Softmax instead of Sinkhorn is more than rounding.
    assert difference(case.run(result.program), case.expected) > 0.01


def test_modified_is_true_when_the_graph_changed_and_false_on_the_second_run(case):
    rewrite = RewriteSinkhorn(case.sites, case.operators)
    before = names(case.module)
    first = rewrite(case.module)
    assert first.modified is True
    assert names(first.program) != before
    after = names(first.program)
    second = rewrite(first.program)
    assert second.modified is False
    assert names(second.program) == after


def test_without_operators_nothing_is_modified(case):
    before = names(case.module)
    result = RewriteSinkhorn(case.sites, {})(case.module)
    assert result.modified is False
    assert names(result.program) == before


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_site_without_an_operator_is_left_as_it_is(case, chosen):
    other = 1 - chosen
    name = case.sites[chosen].name
    result = RewriteSinkhorn(case.sites, {name: case.operators[name]})(case.module)
    assert result.modified is True
    assert case.sites[other].wiring.plan.node in names(result.program)
    assert case.sites[chosen].wiring.plan.node not in names(result.program)
    assert difference(case.run(result.program), case.expected) < FLOAT64


def test_the_rewritten_graph_is_sound_and_the_replaced_loop_is_gone(case):
    result = RewriteSinkhorn(case.sites, case.operators)(case.module)
    result.program.graph.lint()
    left = set(names(result.program))
    for site in case.sites:
        assert not {site.wiring.scores.node, site.wiring.plan.node, site.wiring.attention.output.node} & left
    assert not any("logsumexp" in name for name in left)


def test_a_replaced_loop_that_worked_in_place_is_gone_too():
    case = Case(division_in_place)
    result = RewriteSinkhorn(case.sites, case.operators)(case.module)
    assert difference(case.run(result.program), case.expected) < FLOAT64
    left = set(names(result.program))
    for site in case.sites:
        assert not {site.wiring.scores.node, site.wiring.plan.node, site.wiring.attention.output.node} & left


def test_the_replacement_keeps_the_metadata_of_the_node_it_replaces(case):
    before = {node.name: dict(node.meta) for node in case.module.graph.nodes}
    result = RewriteSinkhorn(case.sites, case.operators)(case.module)
    for site, node in zip(case.sites, calls(result.program, case), strict=True):
        kept = before[site.wiring.attention.output.node]
        assert {"val", "stack_trace", "nn_module_stack"} <= set(kept)
        assert {key: node.meta[key] for key in kept if key != "nn_module_stack"} == {
            key: kept[key] for key in kept if key != "nn_module_stack"
        }
        # By the last entry errors and layers of an engine find the site.
        *modules, mark = node.meta["nn_module_stack"].items()
        assert dict(modules) == kept["nn_module_stack"]
        assert mark[0] == f"{SITE_MARK}{site.name}"


def test_the_operator_is_called_with_the_queries_keys_and_values_of_its_site(case):
    result = RewriteSinkhorn(case.sites, case.operators)(case.module)
    for site, node in zip(case.sites, calls(result.program, case), strict=True):
        assert [arg.name for arg in node.args] == [
            site.wiring.product.query.node,
            site.wiring.product.key.node,
            site.wiring.attention.value.node,
        ]
        assert [operand.node for operand in site.wiring.operands] == [arg.name for arg in node.args]
        assert result.program.get_submodule(node.target).operator is case.operators[site.name]


@pytest.mark.parametrize("missing", ["query", "key", "value", "output"])
def test_a_site_of_another_graph_is_refused_and_the_graph_left_alone(case, missing):
    foreign = changed(case.sites[1], **{missing: Operand("elsewhere", "bhnd")})
    before = names(case.module)
    with pytest.raises(PreconditionError, match=foreign.name):
        RewriteSinkhorn([case.sites[0], foreign], case.operators)(case.module)
    assert names(case.module) == before


def test_sites_may_be_replaced_by_one_pass_after_another(case):
    program = case.module
    for site in case.sites:
        result = RewriteSinkhorn([site], {site.name: case.operators[site.name]})(program)
        assert result.modified is True
        program = result.program
    assert len(calls(program, case)) == len(case.sites)
    assert difference(case.run(program), case.expected) < FLOAT64


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_is_still_dynamic_after_the_next_export(case, batch):
    module = RewriteSinkhorn(case.sites, case.operators)(case.module).program
    again = export(module, case.graph.example.inputs)
    inputs = case.samples[:batch].inputs
    assert difference(again.module()(*inputs.values()), case.expected[:batch]) < FLOAT64
    assert not any("logsumexp" in node.name for node in again.graph.nodes)


class Other(nn.Module):
    """One loop, whose scores, layout and use a model may write in other ways than `Attention`."""

    def __init__(self, forward):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))
        self.written = forward

    def forward(self, x):
        return self.written(self, 2 * self.to_q(x), self.to_k(x), self.to_v(x))


def split(t):
    return t.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def biased(m, q, k, v):
    return log_domain(split(q) @ split(k).mT + m.bias, 5) @ split(v)


def batched_products(m, q, k, v):
    q, k, v = (split(t).flatten(0, 1) for t in (q, k, v))
    return torch.bmm(log_domain(torch.bmm(q, k.mT), 5), v).unflatten(0, (-1, HEADS))


def heads_stacked_first(m, q, k, v):
    q, k, v = (torch.cat(t.chunk(HEADS, dim=-1), dim=0) for t in (q, k, v))
    return torch.cat((log_domain(q @ k.mT, 5) @ v).unflatten(0, (HEADS, -1)).unbind(0), dim=-1)


def equations(m, q, k, v):
    q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (q, k, v))
    plan = log_domain(torch.einsum("bnhd,bmhd->bhnm", q, k), 5)
    return torch.einsum("bhnm,bmhd->bnhd", plan, v).flatten(2)


def keys_first(m, q, k, v):
    """The plan is transposed: what are rows to the loop are its last axis but one."""
    plan = split(k) @ split(q).mT
    for i in range(5):
        plan = plan - torch.logsumexp(plan, dim=-2 + i % 2, keepdim=True)
    return plan.exp().mT @ split(v)


def returned_too(m, q, k, v):
    plan = log_domain(split(q) @ split(k).mT, 5)
    return plan @ split(v), plan


def plan_alone(m, q, k, v):
    return log_domain(split(q) @ split(k).mT, 6)


def logarithm_alone(m, q, k, v):
    log_plan = split(q) @ split(k).mT
    for i in range(6):
        log_plan = log_plan - torch.logsumexp(log_plan, dim=-1 - i % 2, keepdim=True)
    return log_plan


def two_sorts_of_values(m, q, k, v):
    plan = log_domain(split(q) @ split(k).mT, 5)
    return plan @ split(v), plan @ split(q)


@pytest.mark.parametrize(
    "forward",
    [
        biased,
        batched_products,
        heads_stacked_first,
        equations,
        keys_first,
        returned_too,
        plan_alone,
        logarithm_alone,
        two_sorts_of_values,
    ],
)
def test_an_exact_operator_fits_every_way_to_write_the_loop(forward):
    model = Other(forward).double().eval()
    samples = Samples({"x": torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)})
    graph = CapturedGraph(export(model, samples[:2].inputs), samples[:2])
    [site] = find_sinkhorn(graph, samples).sites
    result = RewriteSinkhorn([site], {site.name: exact_operator(site)})(graph.program.module())
    assert result.modified is True
    assert not any("logsumexp" in name for name in names(result.program))
    for batch in (1, 3):
        inputs = samples[:batch].inputs.values()
        with torch.no_grad():
            expected, actual = model(*inputs), result.program(*inputs)
        if not isinstance(expected, tuple):
            expected, actual = (expected,), (actual,)
        for wanted, output in zip(expected, actual, strict=True):
            assert output.shape == wanted.shape
            assert difference(output, wanted) < FLOAT64


class Chained(nn.Module):
    """Two sites, of which the second reads what the first gives, and nothing in between."""

    def __init__(self, reader):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.reader = reader

    def forward(self, x):
        points = {"query": split(self.to_q(x)), "key": split(self.to_k(x)), "value": split(self.to_v(x))}
        points[self.reader] = log_domain(points["query"] @ points["key"].mT, 5) @ points["value"]
        return log_domain(points["query"] @ points["key"].mT, 4) @ points["value"]


@pytest.mark.parametrize("reader", ["query", "value"])
def test_a_site_that_reads_what_another_gives_reads_that_ones_operator(reader):
    model = Chained(reader).double().eval()
    samples = Samples({"x": torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)})
    graph = CapturedGraph(export(model, samples[:2].inputs), samples[:2])
    first, second = find_sinkhorn(graph, samples).sites
    operands = {"query": second.wiring.product.query, "value": second.wiring.attention.value}
    assert operands[reader].node == first.wiring.attention.output.node
    operators = {site.name: exact_operator(site) for site in (first, second)}
    program = RewriteSinkhorn([first, second], operators)(graph.program.module()).program
    assert not any("logsumexp" in name for name in names(program))
    with torch.no_grad():
        assert difference(program(*samples.inputs.values()), model(*samples.inputs.values())) < FLOAT64


def test_a_graph_that_cannot_be_exported_again_is_no_fault_of_the_model(case, monkeypatch):
    def refuse(*args, **options):
        raise CaptureError("torch.export cannot capture the model", "a hint for users")

    monkeypatch.setattr("asapc.writing.rewrite.export", refuse)
    with pytest.raises(InternalError, match="with its operators"):
        rewrite(case.graph, case.sites, case.operators)


class Guarded(nn.Module):
    """Matrices of 4 x 4 with a constant in every divisor, as hyper-connections have them."""

    def forward(self, x):
        plan = x.softmax(-1) + 1e-3
        for i in range(5):
            plan = plan / (plan.sum(dim=-2 + i % 2, keepdim=True) + 1e-3)
        return plan


@pytest.mark.parametrize("lowering", ["materialised", "interleaved"])
def test_what_is_divided_is_not_sent_through_a_logarithm_and_back(lowering):
    x = 2 * torch.randn(5, 3, 4, 4, dtype=torch.float64)
    samples = Samples({"x": x})
    graph = CapturedGraph(export(Guarded().eval(), samples[:2].inputs), samples[:2])
    (found,) = find_sinkhorn(graph, samples).sites
    operator = exact_operator(found, lowering=lowering)
    assert form_of(found, operator) == "kernel"
    assert form_of(changed(found, scale=2 * found.loop.scale), operator) == "scores"  # a power of what is there
    assert form_of(found, exact_operator(changed(found, guard=None))) == "scores"  # which is levelled first
    module = RewriteSinkhorn([found], {found.name: operator})(graph.program.module()).program
    with torch.no_grad():
        assert difference(module(x), Guarded()(x)) < FLOAT64
    traced = export(module, samples[:2].inputs).graph
    targets = {getattr(node.target, "overloadpacket", None) for node in traced.nodes}
    assert not targets & {torch.ops.aten.log, torch.ops.aten.exp}
