"""Says of a recognised loop what it takes to replace it: its product of queries and keys, and its values."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from asapc.ops.scaling import MIN_LIVE
from asapc.passes.find.candidates import Candidate, carry, example_shape, paths_to, scaling_chain
from asapc.passes.find.frames import Frame, place
from asapc.passes.find.kinds import is_view, makes_scores, viewed_by
from asapc.passes.find.probe import Live, difference, double_centre
from asapc.passes.find.products import as_product
from asapc.passes.find.regions import OpenRegionError, Region, double
from asapc.passes.layout import arrange, follow_axes, invert, restore
from asapc.types.site import Attention, DotProduct, Loop, Operand, Site, Wiring

aten = torch.ops.aten
# The code of torch and its modules, wherever an exported program was written.
TORCH_FILE, TORCH_MODULES = re.compile(r"-packages[/\\]torch[/\\]"), "torch.nn.modules."
LINEARITY_TOLERANCE = 1e-6
# Metadata of a node that is a step of an ONNX file's node: the names of both. It stands for a line of code.
SOURCE = "asapc_source"


def describe(
    candidate: Candidate,
    start: Node,
    frame: Frame,
    loop: Loop,
    values: Mapping[Node, Any],
    exponential: bool,
    logarithm: bool,
) -> Site:
    """The site of a candidate that was recognised as a loop; its share of the time is not known here."""
    attention = None if logarithm else find_attention(candidate, frame)
    uses = [place(use, frame.axes) for use in candidate.uses]
    last = candidate.uses[0].user if attention else maker(candidate.plan)
    wiring = Wiring(
        scores=Operand(start.name, frame.axes),
        plan=Operand(candidate.plan.name, frame.axes),
        dtype=values[start].dtype,
        groups=frame.groups,
        exponential=exponential,
        logarithm=logarithm,
        product=describe_product(candidate, start, frame, loop, values, exponential),
        attention=attention,
        applied=any(use is not None and use.contracted == "m" for use in uses),
    )
    return Site(module_path(last), source_line(last), 0.0, loop, wiring)


def describe_product(
    candidate: Candidate, start: Node, frame: Frame, loop: Loop, values: Mapping[Node, Any], exponential: bool
) -> DotProduct | None:
    """The product of queries and keys that scores are made of; None where they are more than a multiple of one."""
    origin = find_product(candidate, start, frame)
    if origin is None:
        return None
    factor = product_factor(origin, candidate, start, frame, values, exponential)
    if factor is None:
        return None
    return DotProduct(
        query=origin.query,
        key=origin.key,
        head_dim=origin.head_dim,
        score_scale=loop.scale * factor,
        folded=folded_factor(origin, frame, values),
        is_scores=origin.path == (start,) and is_pure(start),
        padding=padding(origin, frame, loop, values, exponential),
    )


@dataclass(frozen=True)
class ScoreOrigin:
    """The product of queries and keys that is in the scores, and the way from it to them."""

    query: Operand
    key: Operand
    nodes: tuple[Node, Node]
    head_dim: int
    axes: str
    path: tuple[Node, ...]


def find_product(candidate: Candidate, start: Node, frame: Frame) -> ScoreOrigin | None:
    """The product that scores come from, through views and elementwise steps; None if they come from none."""
    for path in paths_to(start):
        product = as_product(path[0])
        if product is None or path[0] not in candidate.region | {start} or not makes_scores(path[0]):
            continue
        seen = carry(path)
        back = None if seen is None else invert(seen, example_shape(path[0]))
        letters = None if back is None else follow_axes(back, frame.axes, example_shape(start))
        if letters is None or len(product.contracted) != 1:
            continue
        names = {**dict(zip(product.out_axes, letters, strict=True)), product.contracted: "d", "1": "1"}
        left, right = (
            Operand(node.name, "".join(names.get(a, "?") for a in axes))
            for node, axes in ((product.left, product.left_axes), (product.right, product.right_axes))
        )
        query, key = (left, right) if "n" in left.axes else (right, left)
        if "n" in query.axes and "m" in key.axes and "?" not in query.axes + key.axes and "m" not in query.axes:
            size = product.left.meta["val"].shape[left.axes.index("d")]
            nodes = (product.left, product.right) if query is left else (product.right, product.left)
            return ScoreOrigin(query, key, nodes, int(size), letters, path)
    return None


def product_factor(
    origin: ScoreOrigin,
    candidate: Candidate,
    start: Node,
    frame: Frame,
    values: Mapping[Node, Any],
    exponential: bool,
) -> Tensor | None:
    """Factor (H,) from q.k to the scores node; None where it is not one number a head."""
    first = origin.path[0]
    own = float(str(first.kwargs.get("alpha", 1))) if first.target is aten.baddbmm.default else 1.0
    if first is start:
        return torch.full((frame.heads,), own, dtype=torch.float64)
    scores = frame.arrange(values[start])
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(scores.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    region = Region(first, start, candidate.region, values)
    try:
        answers = [
            frame.arrange(region(restore(noise, origin.axes, "nm", frame.groups, frame.heads))) for noise in (one, two)
        ]
    except OpenRegionError:
        return None
    if exponential:
        answers = [answer.log() for answer in answers]
    cells = torch.isfinite(answers[0]) & (answers[0] != answers[1])
    live = Live(cells.any(dim=-1, keepdim=True).double(), cells.any(dim=-2, keepdim=True).double())
    # What is taken off rows or columns on the way, as the largest score is, is of no consequence.
    change, answer = (
        double_centre(torch.where(live.cells, a - b, 0.0).nan_to_num(), live) for a, b in ((one, two), answers)
    )
    factor = (change * answer).sum(dim=(0, 2, 3)) / change.square().sum(dim=(0, 2, 3))
    linear = difference(factor[:, None, None] * change, answer) < LINEARITY_TOLERANCE
    return own * factor if linear else None


def padding(
    origin: ScoreOrigin, frame: Frame, loop: Loop, values: Mapping[Node, Any], exponential: bool
) -> tuple[str, ...] | None:
    """Names of the nodes of a path on which keys are left out by a mask that is the same for all rows; else None.

    Told by sending zeros down the path, all rows of them and a single one.
    """
    first, *rest = origin.path
    if not loop.masked or not rest or not is_pure(first):
        return None
    b, h, n, m = frame.arrange(values[origin.path[-1]]).shape
    biases = []
    for rows in (n, 1):
        zeros = torch.zeros(b, h, rows, m, dtype=torch.float64)
        seen = replay(origin.path, restore(zeros, origin.axes, "nm", frame.groups, frame.heads), values)
        if seen is None:
            return None
        biases.append(frame.arrange(seen.log() if exponential else seen) * loop.scale.reshape(-1, 1, 1))
    bias, of_one = biases
    if of_one.shape != (b, h, 1, m) or not torch.equal(bias, of_one.expand_as(bias)):
        return None
    alone = bool(((of_one == 0) | (of_one < MIN_LIVE)).all())
    return tuple(node.name for node in origin.path) if alone else None


def replay(path: Sequence[Node], value: Tensor, values: Mapping[Node, Any]) -> Tensor | None:
    """What the last node of a path makes of a value of the first; None if more than that has to be known."""
    env: dict[Node, Any] = {path[0]: value}
    for node in path[1:]:
        operator: Any = node.target
        try:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n] if n in env else double(values[n]))
            env[node] = operator(*args, **kwargs)
        except (KeyError, RuntimeError):
            return None
    last: Tensor = env[path[-1]]
    return last


def folded_factor(origin: ScoreOrigin, frame: Frame, values: Mapping[Node, Any]) -> Tensor:
    """Factor (H,) by which queries and keys were multiplied before their product: temperature folded into them."""
    total = torch.ones(frame.heads, dtype=torch.float64)
    start = origin.path[-1]
    axis = next(i for i, letter in enumerate(frame.axes) if letter in "bzy")
    batch, example_batch = values[start].shape[axis], example_shape(start)[axis]
    for node, operand in zip(origin.nodes, (origin.query, origin.key), strict=True):
        path = scaling_chain(node)
        if len(path) < 2:
            continue
        shape = [
            size if isinstance(size, int) else example * batch // example_batch
            for size, example in zip(path[0].meta["val"].shape, example_shape(path[0]), strict=True)
        ]
        try:
            seen = Region(path[0], node, path, values)(torch.ones(shape, dtype=torch.float64))
        except OpenRegionError:
            continue
        last_two = "nd" if "n" in operand.axes else "md"
        scaled = arrange(seen, operand.axes, last_two, frame.groups, frame.heads)
        factor = scaled.amax(dim=(0, 2, 3))
        if torch.equal(factor, scaled.amin(dim=(0, 2, 3))):
            total = total * factor
    return total


def find_attention(candidate: Candidate, frame: Frame) -> Attention | None:
    """The product of plan and values, where the plan goes there alone and unchanged."""
    if len(candidate.uses) != 1:
        return None
    [use] = candidate.uses
    if any(len(readers(node)) != 1 for node in use.path) or not all(is_view(node) for node in use.path[1:]):
        return None
    placed = place(use, frame.axes)
    if placed is None or placed.contracted != "m":
        return None
    product, names = placed.product, dict(placed.names)
    node, own = (product.right, product.right_axes) if placed.side == "left" else (product.left, product.left_axes)
    free = [a for a in own if a not in names and a != "1"]
    if len(free) != 1 or free[0] not in product.out_axes or not is_pure(product.node) or node is use.path[-1]:
        return None
    names |= {free[0]: "e", "1": "1"}
    value = Operand(node.name, "".join(names[a] for a in own))
    output = Operand(product.node.name, "".join(names[a] for a in product.out_axes))
    return Attention(value, output) if {"n", "e"} <= set(output.axes) and "m" in value.axes else None


def is_pure(node: Node) -> bool:
    """Whether a product adds no further term."""
    return node.target is not aten.baddbmm.default


def readers(node: Node) -> list[Node]:
    """Users of a node, less those that compute nothing."""
    return [user for user in node.users if user.users or user.op == "output"]


def maker(node: Node) -> Node:
    """The node that makes what another only moves about or passes on, as dropout does."""
    while (source := viewed_by(node)) is not None:
        node = source
    return node


def source_line(node: Node) -> str | None:
    """Return "file:line" of the user's code, and none of torch's, that a node was traced from; or its SOURCE."""
    if SOURCE in node.meta:
        return str(node.meta[SOURCE])
    frames = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not TORCH_FILE.search(frame[0])]
    return ":".join(own[-1]) if own else None


def module_path(node: Node) -> str:
    """Path of the innermost module that is no layer of torch's, e.g. "blocks.0"; "attention" for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    own = [path for path, kind in stack if not str(kind).startswith(TORCH_MODULES)] or [path for path, _ in stack]
    return (own[-1] if own else "") or "attention"
