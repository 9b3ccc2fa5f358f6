import functools

import pytest
import torch
from helpers.relowering import captured
from helpers.slow import slow_beyond
from helpers.tolerances import FLOAT64, difference
from helpers.zoo import NEGATIVES, POSITIVES
from torch import nn

from asapc.capturing.export import export
from asapc.passes.base import PreconditionError
from asapc.passes.find.build import BuildPlan, build_plans
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import exact_operator
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples

WIDTH, HEADS, TOKENS, CONTEXT = 16, 2, 6, 9
HALF_STEPS = 6


def vectors(kernel):
    """Scaling vectors (..., N, 1) and (..., M, 1) of a kernel (..., N, M) after six half-steps, rows last."""
    a = torch.ones_like(kernel[..., :1])
    for _ in range(HALF_STEPS // 2):
        b = 1 / (kernel.mT @ a)
        a = 1 / (kernel @ b)
    return a, b


class Model(nn.Module):
    """Cross attention; `written` says what becomes of queries, keys and values (B, H, N or M, D)."""

    def __init__(self, written):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gate = nn.Linear(WIDTH, 1)
        self.written = written

    def forward(self, x, context):
        q, k, v = (
            layer(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, tokens in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.written(self, 2 * q, k, v, context)


def matmul(m, q, k, v, context):
    kernel = (q @ k.mT).exp()
    a, b = vectors(kernel)
    return a * (kernel @ (b * v))


def values_first(m, q, k, v, context):
    kernel = (k @ q.mT).exp()  # B H M N
    a, b = vectors(kernel.mT)
    return (v.mT * b.mT) @ kernel * a.mT


def bmm(m, q, k, v, context):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    kernel = torch.bmm(q, k.mT).exp()
    a, b = vectors(kernel)
    return (a * torch.bmm(kernel, b * v)).unflatten(0, (-1, HEADS))


def scaled_apart(m, q, k, v, context):
    """The heads are merged for the products only."""
    kernel = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).exp()
    a, b = (vector.unflatten(0, (-1, HEADS)) for vector in vectors(kernel))
    y = torch.bmm(kernel, (b * v).flatten(0, 1)).unflatten(0, (-1, HEADS)).transpose(1, 2)
    return y * a.transpose(1, 2)


def equations(m, q, k, v, context):
    """No axis stands where matmul would have it."""
    q, k, v = (t.permute(2, 0, 1, 3) for t in (q, k, v))  # N B H D
    kernel = torch.einsum("nbhd,mbhd->hnbm", q, k).exp()
    a = torch.ones_like(kernel[..., 0])  # H N B
    for _ in range(HALF_STEPS // 2):
        b = 1 / torch.einsum("hnbm,hnb->hbm", kernel, a)
        a = 1 / torch.einsum("hnbm,hbm->hnb", kernel, b)
    return torch.einsum("hnbm,mbhd->bnhd", kernel, b.permute(2, 1, 0)[..., None] * v) * a.permute(2, 1, 0)[..., None]


def one_equation(m, q, k, v, context):
    kernel = (q @ k.mT).exp()
    a, b = (vector.squeeze(-1) for vector in vectors(kernel))
    return torch.einsum("xyz, xyzw, xyw, xywv -> xyzv", a, kernel, b, v)


def equation_scaled_again(m, q, k, v, context):
    kernel = (q @ k.mT).exp()
    a, b = vectors(kernel)
    return torch.einsum("bhnm,bhm,bhmd->bhnd", kernel, b.squeeze(-1), v) * a


def contiguous_by_scaling(m, q, k, v, context):
    """The scaled result lies in memory as the heads' merging wants it; the product does not."""
    kernel = (q @ k.mT).exp()
    a, b = vectors(kernel)
    y = a.transpose(1, 2).contiguous() * (kernel @ (b * v)).transpose(1, 2)
    return y.view(*y.shape[:2], WIDTH)


def division(m, q, k, v, context):
    """By the sums that the vectors are the inverses of, and by numbers on the way."""
    kernel = (q @ k.mT).exp()
    a = torch.ones_like(kernel[..., :1])
    for _ in range(HALF_STEPS // 2):
        columns = kernel.mT @ a
        rows = kernel @ (1 / columns)
        a = 1 / rows
    return 3 * (kernel @ (v / 3 / columns) / rows)


def half_built(m, q, k, v, context):
    kernel = (q @ k.mT).exp()
    a, b = vectors(kernel)
    return (a * kernel) @ (b * v)


def expanded(m, q, k, v, context):
    kernel = (q @ k.mT).exp()
    a, b = vectors(kernel)
    y = kernel @ (b.expand_as(v) * v)
    return a.expand_as(y) * y


def duals(m, q, k, v, context):
    """Potentials, one of which goes into the kernel, the other one to the values."""
    scores = q @ k.mT
    f = torch.zeros_like(scores[..., :1])
    for _ in range(HALF_STEPS // 2):
        g = -torch.logsumexp(scores + f, dim=-2, keepdim=True)
        f = -torch.logsumexp(scores + g, dim=-1, keepdim=True)
    return (scores + f).exp() @ (g.mT.exp() * v)


def gated_too(m, q, k, v, context):
    """A gate on the values, between them and the vector, stays where it is; so does one on the result."""
    kernel = (q @ k.mT).exp()
    a, b = vectors(kernel)
    gate = torch.sigmoid(m.gate(context))[:, None]
    return (kernel @ (gate * (b * v))).mul(torch.tanh(q.sum(dim=-1, keepdim=True))) * a


def read_twice(m, q, k, v, context):
    """What is not yet scaled is read by something else too: only the values' vector can move."""
    kernel = (q @ k.mT).exp()
    a, b = vectors(kernel)
    y = (a * kernel) @ (b * v)
    return y * a, y


SPELLINGS = [
    matmul,
    values_first,
    bmm,
    scaled_apart,
    equations,
    one_equation,
    equation_scaled_again,
    contiguous_by_scaling,
    division,
    half_built,
    expanded,
    duals,
    gated_too,
    read_twice,
]


def gated_values(m, q, k, v, context):
    return (q @ k.mT).softmax(-1) @ (torch.sigmoid(m.gate(context))[:, None] * v)


def gated_results(m, q, k, v, context):
    """Nor does a gate count that varies along the values' own axis, and is made of the matrix."""
    kernel = (q @ k.mT).exp()
    return (kernel @ v) * torch.sigmoid(kernel.sum(-1, keepdim=True) * v[:, :, :1])


def built(m, q, k, v, context):
    kernel = (q @ k.mT).exp()
    a, b = vectors(kernel)
    return (a * kernel * b.mT) @ v


def sums_of_products(m, q, k, v, context):
    """Linear attention scales by sums over the keys, of which neither queries nor keys are made."""
    q, k = q.exp(), k.exp()
    return (q * m.to_q.weight.sum()) @ (k.mT @ (v / v.sum(dim=-2, keepdim=True)))


def of_another_type(m, q, k, v, context):
    kernel = (q @ k.mT).exp()
    return kernel.float() @ (kernel.sum(dim=-2).unsqueeze(-1) * v).float()


LEFT_ALONE = [gated_values, gated_results, built, sums_of_products, of_another_type]


@functools.cache
def capture_of(written):
    """A model in float64, five samples and its graph."""
    torch.manual_seed(0)
    model = Model(written).double().eval()
    samples = Samples(
        {"x": torch.randn(5, TOKENS, WIDTH).double(), "context": torch.randn(5, CONTEXT, WIDTH).double()},
    )
    return model, samples, CapturedGraph(export(model, samples[:2].inputs), samples[:2])


def run(module, samples):
    with torch.no_grad():
        result = module(*samples.inputs.values())
    return result if isinstance(result, tuple) else (result,)


def names(module):
    return [node.name for node in module.graph.nodes]


by_spelling = pytest.mark.parametrize("written", slow_beyond(SPELLINGS), ids=lambda written: written.__name__)


@by_spelling
def test_outputs_stay_as_they_were_for_every_batch(written):
    model, samples, graph = capture_of(written)
    result = BuildPlan()(graph.program.module())
    assert result.modified is True
    for batch in (1, 2, 5):
        pairs = zip(run(result.program, samples[:batch]), run(model, samples[:batch]), strict=True)
        assert all(actual.shape == expected.shape for actual, expected in pairs)
        assert all(difference(actual, expected) < FLOAT64 for actual, expected in pairs)


@by_spelling
def test_modified_is_true_when_the_graph_changed_and_false_on_the_second_run(written):
    _, _, graph = capture_of(written)
    build = BuildPlan()
    first = build(graph.program.module())
    assert first.modified is True
    assert len(build.plans) == 1
    assert set(build.plans.values()) <= set(names(first.program))
    first.program.graph.lint()
    after = names(first.program)
    second = build(first.program)
    assert second.modified is False
    assert build.plans == {}
    assert names(second.program) == after


@by_spelling
def test_the_plan_is_found_and_an_exact_operator_fits(written):
    model, samples, graph = capture_of(written)
    assert all(not site.wiring.applied for site in find_sinkhorn(graph, samples).sites)
    graph = build_plans(graph, samples)
    [site] = find_sinkhorn(graph, samples).sites
    assert (site.loop.half_steps, site.loop.last, site.wiring.applied) == (HALF_STEPS, "rows", True)
    rewritten = RewriteSinkhorn([site], {site.name: exact_operator(site)})(graph.program.module()).program
    assert not any("reciprocal" in name or "logsumexp" in name for name in names(rewritten)) or written is read_twice
    for batch in (1, 5):
        for module in (graph.program.module(), rewritten):
            for actual, expected in zip(run(module, samples[:batch]), run(model, samples[:batch]), strict=True):
                assert difference(actual, expected) < FLOAT64


@pytest.mark.parametrize("written", LEFT_ALONE, ids=lambda written: written.__name__)
def test_what_is_no_scaling_of_the_matrix_does_not_move(written):
    _, samples, graph = capture_of(written)
    module = graph.program.module()
    before = names(module)
    result = BuildPlan()(module)
    assert result.modified is False
    assert names(result.program) == before
    assert build_plans(graph, samples) is graph


def test_the_result_keeps_its_node_and_the_plan_names_the_line_of_the_product():
    _, _, graph = capture_of(matmul)
    module = graph.program.module()
    [end] = [node for node in module.graph.nodes if node.target is torch.ops.aten.mul.Tensor][-1:]
    before, product = dict(end.meta), dict(end.args[1].meta)
    build = BuildPlan()
    build(module)
    assert end in list(module.graph.nodes)
    assert all(end.meta[key] is value for key, value in before.items())
    assert end.target is torch.ops.aten.matmul.default
    [plan] = [node for node in module.graph.nodes if node.name in build.plans.values()]
    assert end.args[0] is plan
    assert {key: plan.meta[key] for key in ("stack_trace", "nn_module_stack")} == {
        key: product[key] for key in ("stack_trace", "nn_module_stack")
    }
    assert plan.meta["val"].shape == (*product["val"].shape[:-1], CONTEXT)


def test_a_graph_without_shapes_is_refused():
    with pytest.raises(PreconditionError):
        BuildPlan()(torch.fx.symbolic_trace(nn.Linear(2, 2)))


class Two(nn.Module):
    """A Sinkhorn whose plan is not built, and a softmax whose values are weighed by the attention itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Model(matmul), Model(self.weighed)

    @staticmethod
    def weighed(m, q, k, v, context):
        attention = (q @ k.mT).softmax(-1)
        return attention @ (attention.mean(dim=-2).unsqueeze(-1) * v)

    def forward(self, x, context):
        return self.first(x, context), self.second(x, context)


def test_only_plans_that_are_sinkhorn_stay_built_and_the_graph_given_is_not_changed():
    samples = Samples({"x": torch.randn(4, TOKENS, WIDTH), "context": torch.randn(4, CONTEXT, WIDTH)})
    model = Two().eval()
    graph = CapturedGraph(export(model, samples[:2].inputs), samples[:2])
    before = names(graph.program.graph_module)
    everything, chosen = BuildPlan(), BuildPlan()
    everything(graph.program.module())
    built = build_plans(graph, samples)
    assert names(graph.program.graph_module) == before
    assert len(everything.plans) == 2
    assert len(find_sinkhorn(built, samples).sites) == 1
    assert chosen(built.program.module()).modified is True
    assert len(chosen.plans) == 1  # the second one is as it was
    assert [node.name for node in built.program.graph.nodes if node.op == "output"] == ["output"]


@pytest.mark.parametrize("name", [case.name for case in NEGATIVES[::3]])
def test_the_graphs_of_negatives_are_returned_as_they_are(name):
    [case] = [case for case in NEGATIVES if case.name == name]
    inputs = case.inputs(4, torch.Generator().manual_seed(1))
    graph = captured(case.build().eval(), inputs)
    assert "build_plan" not in str(graph)
    assert build_plans(graph, Samples(inputs)) is graph


def test_plans_that_are_built_already_are_left_alone():
    [case] = [case for case in POSITIVES if case.name == "vectors_by_matmul"]
    inputs = case.inputs(4, torch.Generator().manual_seed(1))
    graph = captured(case.build().eval(), inputs)
    assert build_plans(graph, Samples(inputs)) is graph
