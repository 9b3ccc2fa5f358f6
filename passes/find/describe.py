"""Describes a recognised loop as far as a rewrite needs it: its product of queries and keys, and its values."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from asapc.ops.scaling import MIN_LIVE
from asapc.passes.find.candidates import (
    PlanCandidate,
    Use,
    carry,
    example_shape,
    paths_to,
    scaling_chain,
    score_product,
)
from asapc.passes.find.frames import Frame, place
from asapc.passes.find.kinds import is_view, maker
from asapc.passes.find.probe import Live, difference, double_centre
from asapc.passes.find.products import Product
from asapc.passes.find.regions import OpenRegionError, Region, double
from asapc.passes.layout import arrange, follow_axes, invert, restore
from asapc.types.site import Attention, DotProduct, Loop, Operand, Site, Wiring

aten = torch.ops.aten
# The code of torch, what it writes itself and its modules, on whatever machine a program was exported.
TORCH_FILE, TORCH_MODULES = re.compile(r"-packages[/\\]torch[/\\]|^<eval_with_key>"), "torch.nn.modules."
LINEARITY_TOLERANCE = 1e-6  # relative, in float64
# Metadata of a node that is a step of an ONNX file's node: the names of both. It stands for a line of code.
SOURCE = "asapc_source"


def describe(
    candidate: PlanCandidate,
    start: Node,
    frame: Frame,
    loop: Loop,
    values: Mapping[Node, Any],
    exponential: bool,
    logarithm: bool,
) -> Site:
    """Return the site of a candidate that was recognised as a loop; its share of the time is left at 0."""
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
    candidate: PlanCandidate, start: Node, frame: Frame, loop: Loop, values: Mapping[Node, Any], exponential: bool
) -> DotProduct | None:
    """Return the product of queries and keys that the scores are a multiple of; None where they are not."""
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
    """The product of queries and keys that is in the scores, and the path from it to them."""

    query: Operand
    key: Operand
    nodes: tuple[Node, Node]
    head_dim: int
    axes: str
    path: tuple[Node, ...]


def find_product(candidate: PlanCandidate, start: Node, frame: Frame) -> ScoreOrigin | None:
    """Return the product that scores come from, through views and elementwise steps; None if they come from none."""
    for path in paths_to(start):
        product = score_product(path[0])
        letters = letters_before(path, frame.axes) if product and path[0] in candidate.region | {start} else None
        origin = score_origin(product, letters, path) if product and letters else None
        if origin is not None:
            return origin
    return None


def letters_before(path: Sequence[Node], axes: str) -> str | None:
    """Return the letters of the axes of a path's first node, given those of its last; None if they are lost."""
    places = carry(path)
    back = None if places is None else invert(places, example_shape(path[0]))
    return None if back is None else follow_axes(back, axes, example_shape(path[-1]))


def score_origin(product: Product, letters: str, path: tuple[Node, ...]) -> ScoreOrigin | None:
    """Read a product, whose axes have these letters, as queries times keys; None where it is not."""
    if len(product.contracted) != 1:
        return None
    names = {**dict(zip(product.out_axes, letters, strict=True)), product.contracted: "d", "1": "1"}
    left, right = (
        Operand(node.name, "".join(names.get(a, "?") for a in axes))
        for node, axes in ((product.left, product.left_axes), (product.right, product.right_axes))
    )
    query, key = (left, right) if "n" in left.axes else (right, left)
    rows_by_columns = "n" in query.axes and "m" in key.axes and "m" not in query.axes
    if not rows_by_columns or "?" in query.axes + key.axes:
        return None
    size = product.left.meta["val"].shape[left.axes.index("d")]
    nodes = (product.left, product.right) if query is left else (product.right, product.left)
    return ScoreOrigin(query, key, nodes, int(size), letters, path)


def product_factor(
    origin: ScoreOrigin,
    candidate: PlanCandidate,
    start: Node,
    frame: Frame,
    values: Mapping[Node, Any],
    exponential: bool,
) -> Tensor | None:
    """Return the factor (H,) from q.k to the scores node; None where it is not one number a head."""
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
    # Terms subtracted from rows or columns on the path, as the largest score is, make no difference to the plan.
    change, answer = (
        double_centre(torch.where(live.cells, a - b, 0.0).nan_to_num(), live) for a, b in ((one, two), answers)
    )
    factor = (change * answer).sum(dim=(0, 2, 3)) / change.square().sum(dim=(0, 2, 3))
    linear = difference(factor[:, None, None] * change, answer) < LINEARITY_TOLERANCE
    return own * factor if linear else None


def padding(
    origin: ScoreOrigin, frame: Frame, loop: Loop, values: Mapping[Node, Any], exponential: bool
) -> tuple[str, ...] | None:
    """Return the nodes of a path on which a mask, the same for all rows, leaves out keys; else None.

    Sends zeros down the path, in all rows and in a single one: what comes out is the bias that the path adds.
    """
    first, *rest = origin.path
    if not loop.masked or not rest or not is_pure(first):
        return None
    b, h, n, m = frame.arrange(values[origin.path[-1]]).shape
    biases = []
    for rows in (n, 1):
        zeros = torch.zeros(b, h, rows, m, dtype=torch.float64)
        result = replay(origin.path, restore(zeros, origin.axes, "nm", frame.groups, frame.heads), values)
        if result is None:
            return None
        biases.append(frame.arrange(result.log() if exponential else result) * loop.scale.reshape(-1, 1, 1))
    bias, row = biases
    if row.shape != (b, h, 1, m) or not torch.equal(bias, row.expand_as(bias)):
        return None
    only_masks = bool(((row == 0) | (row < MIN_LIVE)).all())
    return tuple(node.name for node in origin.path) if only_masks else None


def replay(path: Sequence[Node], value: Tensor, values: Mapping[Node, Any]) -> Tensor | None:
    """Compute the last node of a path from a value of the first; None if a value outside the path is missing."""
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
    """Return the factor (H,) by which queries and keys are multiplied before their product: a temperature, say."""
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
        factor = chain_factor(path, shape, operand, frame, values)
        if factor is not None:
            total = total * factor
    return total


def chain_factor(
    path: Sequence[Node], shape: Sequence[int], operand: Operand, frame: Frame, values: Mapping[Node, Any]
) -> Tensor | None:
    """Return the factor (H,) by which a chain of scalings multiplies, by sending ones of a shape down; else None."""
    try:
        result = Region(path[0], path[-1], path, values)(torch.ones(shape, dtype=torch.float64))
    except OpenRegionError:
        return None
    last_two = "nd" if "n" in operand.axes else "md"
    scaled = arrange(result, operand.axes, last_two, frame.groups, frame.heads)
    factor = scaled.amax(dim=(0, 2, 3))
    return factor if torch.equal(factor, scaled.amin(dim=(0, 2, 3))) else None


def find_attention(candidate: PlanCandidate, frame: Frame) -> Attention | None:
    """Return the product of plan and values, where nothing else reads the plan and nothing changes it before."""
    use = only_use(candidate)
    if use is None:
        return None
    placement = place(use, frame.axes)
    if placement is None or placement.contracted != "m":
        return None
    product, names = placement.product, dict(placement.names)
    node, own = (product.right, product.right_axes) if placement.side == "left" else (product.left, product.left_axes)
    free = [a for a in own if a not in names and a != "1"]
    if len(free) != 1 or free[0] not in product.out_axes or not is_pure(product.node) or node is use.path[-1]:
        return None
    names |= {free[0]: "e", "1": "1"}
    value = Operand(node.name, "".join(names[a] for a in own))
    output = Operand(product.node.name, "".join(names[a] for a in product.out_axes))
    return Attention(value, output) if {"n", "e"} <= set(output.axes) and "m" in value.axes else None


def only_use(candidate: PlanCandidate) -> Use | None:
    """Return the use of a plan that only views lead to and that nothing else shares; None if there is none."""
    if len(candidate.uses) != 1:
        return None
    [use] = candidate.uses
    alone = all(len(readers(node)) == 1 for node in use.path)
    return use if alone and all(is_view(node) for node in use.path[1:]) else None


def is_pure(node: Node) -> bool:
    """Return whether a product adds no other term."""
    return node.target is not aten.baddbmm.default


def readers(node: Node) -> list[Node]:
    """Return the users of a node, less those that compute nothing."""
    return [user for user in node.users if user.users or user.op == "output"]


def source_line(node: Node) -> str | None:
    """Return the "file:line" of the user's code, not torch's, that a node was traced from; or its SOURCE."""
    if SOURCE in node.meta:
        return str(node.meta[SOURCE])
    frames = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not TORCH_FILE.search(frame[0])]
    return ":".join(own[-1]) if own else None


def module_path(node: Node) -> str:
    """Return the path of the innermost module that is no torch layer, e.g. "blocks.0"; "attention" for the model."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    own = [path for path, kind in stack if not str(kind).startswith(TORCH_MODULES)] or [path for path, _ in stack]
    return (own[-1] if own else "") or "attention"
