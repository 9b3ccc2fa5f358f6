"""What doubly-stochastic attention is for, on trained teachers before and after compiling, beside their softmax twins.

Attention sinks: the share of a layer's attention that goes to its most attended key, and the largest column sum. Rank
collapse: the effective rank of the tokens by depth. One pass gives up that columns sum to one exactly; does it keep
these?
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from asapc.commands.study import study
from asapc.fidelity.sites import Reference
from asapc.passes.layout import score_factor, site_inputs
from asapc.passes.record import record
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.pictures import new_figure, save
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.types.teacher import Teacher
from benchmarks.study.forms import BATCH, DEFAULT, ONE_PASS, SOFTMAX, compiled, planned
from benchmarks.study.models import trained
from benchmarks.study.tables import spread
from benchmarks.study.teachers import QUICK_TASKS, TASKS, by_task, cases_of, count_seeds

SAMPLES, QUICK_SAMPLES = 128, 8  # held-out
BLOCK = re.compile(r"\bblocks\.(\d+)")
SOFTMAXES = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)
LOOP = "Sinkhorn"
FIGURE = "study-sinks.png"
MEASURES = {
    "top_share": "share of the top key, in multiples of a uniform share",
    "largest_column": "largest column sum of any sample",
    "rank": "effective rank of the tokens",
}
STYLES: dict[str, dict[str, Any]] = {
    SOFTMAX: {"color": "black"},
    LOOP: {"color": "C0", "linewidth": 3, "alpha": 0.5},
    ONE_PASS: {"color": "C1", "linestyle": "--"},
    DEFAULT: {"color": "C2", "linestyle": ":"},
}
Row = dict[str, Any]


def cases(quick: bool) -> dict[str, Callable[[], Row]]:
    """Return a case for each teacher and its twin."""
    return cases_of(measure, quick, QUICK_TASKS if quick else TASKS)


def measure(task: str, seed: int, quick: bool) -> Row:
    """Measure a twin with softmax, a teacher, and the teacher compiled; lists go by layer, ranks by depth."""
    twin, teacher = (study(trained(task, attention, seed, quick)) for attention in ("softmax", "sinkhorn"))
    samples = teacher.held_out[: QUICK_SAMPLES if quick else SAMPLES]
    forms = {LOOP: {}, **compiled(teacher, planned(teacher))}
    return {
        "task": task,
        "seed": seed,
        "samples": len(samples),
        "tokens": teacher.sites[0].loop.keys,
        "half_steps": teacher.sites[0].loop.half_steps,
        "models": {SOFTMAX: look(twin, {}, samples)}
        | {name: look(teacher, modules, samples) for name, modules in forms.items()},
    }


def look(teacher: Teacher, modules: Mapping[str, nn.Module], samples: Samples) -> Row:
    """Measure the plans and the tokens of a model in which operators replace some loops, or none."""
    graph, sites = teacher.graph, teacher.sites
    program = RewriteSinkhorn(sites, modules)(graph.program.module()).program
    depths = tokens_by_depth(graph.program.graph)
    weights = [] if sites else softmax_weights(graph.program.graph)
    nodes = {*depths, *weights, *(operand.node for site in sites for operand in site.wiring.operands)}
    nodes |= {site.wiring.plan.node for site in sites if site.name not in modules}
    shares: list[list[Tensor]] = []  # by batch, then by layer
    ranks: list[list[Tensor]] = []  # by batch, then by depth
    for batch in samples.batches(graph.samples_at_once(BATCH)):
        values = record(program, batch, nodes)
        plans = [values[node] for node in weights] + [plan(site, modules.get(site.name), values) for site in sites]
        shares.append([top_share(of_layer) * of_layer.shape[-1] for of_layer in plans])
        ranks.append([effective_rank(values[node]) for node in depths])
    of_layers = [torch.cat(of_layer) for of_layer in zip(*shares, strict=True)]
    of_depths = [torch.cat(of_depth) for of_depth in zip(*ranks, strict=True)]
    return {
        "top_share": [float(of_layer.mean()) for of_layer in of_layers],
        "largest_column": [float(of_layer.max()) for of_layer in of_layers],
        "rank": [float(of_depth.mean()) for of_depth in of_depths],
    }


def plan(site: Site, module: nn.Module | None, values: Mapping[str, Tensor]) -> Tensor:
    """Return the plan (B, H, N, M) of a site, or that of the operator that replaces it, from recorded values."""
    if module is None:
        return Reference.of(site, values).plan
    operands = [values[operand.node] for operand in site.wiring.operands]
    inputs = site_inputs(site, operands, score_factor(site, site.wiring.dtype))
    with torch.no_grad():
        result: Tensor = module(inputs.scores, inputs.queries, inputs.keys)
    return result


def tokens_by_depth(graph: Graph) -> list[str]:
    """Return the names of the nodes of tokens (B, N, C): what the first block reads, and what each block returns."""
    depths: dict[int, str] = {}
    for node in graph.nodes:
        value, here = node.meta.get("val"), block_of(node)
        if node.op != "call_function" or not isinstance(value, Tensor) or value.dim() != 3:
            continue
        users = {block_of(user) for user in node.users}
        if (here is None and 0 in users) or (here is not None and users - {here}):
            depths[0 if here is None else here + 1] = node.name
    return [depths[depth] for depth in sorted(depths)]


def block_of(node: Node) -> int | None:
    """Return the number of the block that a node stands in, None outside of blocks."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    match = next(filter(None, map(BLOCK.search, paths)), None)
    return None if match is None else int(match[1])


def softmax_weights(graph: Graph) -> list[str]:
    """Return the names of the nodes of softmax attention's weights (B, H, N, M), layer by layer."""
    return [node.name for node in graph.nodes if node.target in SOFTMAXES and node.meta["val"].dim() == 4]


def top_share(plan: Tensor) -> Tensor:
    """Return the share of the mass of plans (B, H, N, M) that the most attended key gets, (B, H)."""
    columns = plan.double().sum(dim=-2)
    return columns.amax(dim=-1) / columns.sum(dim=-1)


def effective_rank(tokens: Tensor) -> Tensor:
    """Return the effective rank (B,) of tokens (B, N, C) less their mean over the tokens.

    It is the exponential of the entropy of the singular values' shares in their sum (Roy and Vetterli, "The effective
    rank", EUSIPCO 2007): r where r directions carry as much each, and 1 where all tokens are the same.
    """
    exact = tokens.double()
    values = torch.linalg.svdvals(exact - exact.mean(dim=-2, keepdim=True))
    shares = values / values.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(shares).sum(dim=-1).exp()


def section(rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield the section: a table for each task, and what it says."""
    yield "## What doubly-stochastic attention is for"
    yield ""
    yield (
        "Softmax lets many queries attend to one key, a sink; a doubly-stochastic plan gives each key its share. And "
        "attention draws the tokens together, layer by layer, which their effective rank shows. Both on held-out "
        f"samples, of teachers trained with Sinkhorn ({LOOP}), of the same compiled without retraining, by one pass "
        "and as the planner chooses by default, and of twins trained with softmax. A share is a multiple of a uniform "
        "one, mean over samples and heads; the largest column sum is that of any sample and head, where 1 is uniform. "
        "The effective rank is that of the tokens less their mean, by depth: before the first layer, and after each."
    )
    yield ""
    yield f"![Attention's share of the top key, and effective rank, by depth]({FIGURE})"
    yield ""
    for task, of_seeds in by_task(rows).items():
        first = of_seeds[0]
        yield f"### {task}: {first['tokens']} tokens, {first['half_steps']} half-steps, {count_seeds(of_seeds)}"
        yield ""
        names = list(of_seeds[0]["models"])
        yield "| | " + " | ".join(names) + " |"
        yield "|---|" + "---:|" * len(names)
        for key, title in MEASURES.items():
            for number in range(len(of_seeds[0]["models"][LOOP][key])):
                place = f"layer {number + 1}" if key != "rank" else f"depth {number}"
                cells = [spread([row["models"][name][key][number] for row in of_seeds]) for name in names]
                yield f"| {title}, {place} | " + " | ".join(cells) + " |"
        yield ""
        yield verdict(of_seeds)
        yield ""


def verdict(of_seeds: Sequence[Row]) -> str:
    """Say what a task's models differ in: means of seeds and layers, and ranks after the last."""
    share, column = (
        {name: fmean(fmean(row["models"][name][key]) for row in of_seeds) for name in of_seeds[0]["models"]}
        for key in ("top_share", "largest_column")
    )
    rank = {name: fmean(row["models"][name]["rank"][-1] for row in of_seeds) for name in of_seeds[0]["models"]}
    return (
        f"The top key gets {share[SOFTMAX]:.2f} times a uniform share by softmax, {share[LOOP]:.2f} by {LOOP}, "
        f"{share[ONE_PASS]:.2f} in one pass and {share[DEFAULT]:.2f} by default; the largest column sums are "
        f"{column[SOFTMAX]:.1f}, {column[LOOP]:.2f}, {column[ONE_PASS]:.2f} and {column[DEFAULT]:.2f}. After the last "
        f"layer the effective rank is {rank[SOFTMAX]:.1f}, {rank[LOOP]:.1f}, {rank[ONE_PASS]:.1f} and "
        f"{rank[DEFAULT]:.1f}.{kept(share)}"
    )


def kept(share: Mapping[str, float]) -> str:
    """Say how much one pass keeps, where softmax gives the top key more than the loop does."""
    distance = share[SOFTMAX] - share[LOOP]
    if distance <= 0:
        return ""
    part = (share[SOFTMAX] - share[ONE_PASS]) / distance
    return f" One pass keeps {part:.0%} of the distance between softmax and {LOOP} in the top key's share."


def draw(rows: Mapping[str, Row], folder: Path) -> None:
    """Draw the share of the top key and the effective rank by depth, a column for each task."""
    groups = by_task(rows)
    figure = new_figure((max(6.0, 1.0 + 2.6 * len(groups)), 5.6))
    panels = figure.subplots(2, len(groups), squeeze=False)
    for column, (task, of_seeds) in zip(panels.T, groups.items(), strict=True):
        for axes, key in zip(column, ("top_share", "rank"), strict=True):
            draw_measure(axes, key, [row["models"] for row in of_seeds])
        column[0].set_title(task)
    panels[0, 0].set_ylabel("share of the top key")
    panels[1, 0].set_ylabel("effective rank")
    names = panels[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=len(STYLES), frameon=False)
    save(figure, folder / FIGURE)


def draw_measure(axes: Any, key: str, of_seeds: Sequence[Row]) -> None:
    """Draw one measure of all models by layer or depth, mean of the seeds."""
    first = 0 if key == "rank" else 1  # ranks are of the tokens before the first layer too
    for name, style in STYLES.items():
        means = [fmean(values) for values in zip(*(models[name][key] for models in of_seeds), strict=True)]
        places = range(first, first + len(means))
        axes.plot(places, means, marker="o", label=name, **style)
        axes.set_xticks(places)
    axes.set(ylim=(0, 1.1 * axes.dataLim.y1), xlabel="depth" if key == "rank" else "layer")
    axes.grid(alpha=0.3)
