"""Brings tensors from the layout of a user's graph into the one that operators work in, and back.

Letters name axes, see `types.site.Operand`. A tensor of positions, sent through the graph's own views, shows which axis
of a node is which axis of the scores. So there is no list of view operators to keep, and heads that `cat` stacks are
followed as well.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from asapc.ops.scaling import MIN_LIVE
from asapc.types.site import Operand, Site

UNIT_TOLERANCE = 1e-9
# Letters of merged axes: samples before heads, and heads before samples.
MERGED = {"z": "bh", "y": "hb"}
# What an operator reads: the scores (B, H, N, M); the scores computed as (B, H, M, N), which saves a transposition; or
# queries (B, H, N, D) in units of the temperature, whose products with the keys are the scores; or exp of the scores,
# where the graph holds that.
Form = Literal["scores", "turned", "points", "kernel"]


class Inputs(NamedTuple):
    """The arguments of a site's operator, (B, H, ...).

    Attributes:
        scores: the scores in one of the forms; see `Form`.
        queries, keys: None where the scores are no product.
        values: None where the result is the plan.
        live: (B, H, 1, M), 1 for a live key and 0 for a masked one; in the form "points" alone, where keys are masked.
    """

    scores: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    live: Tensor | None = None


def arrange(tensor: Tensor, axes: str, last_two: str, groups: int, heads: int) -> Tensor:
    """Return the tensor as (B, H, ...), with the axes `last_two` at its end.

    Args:
        tensor: of the layout `axes`.
        axes: its letters; those of b, g and h that it lacks become axes of length 1.
        last_two: letters of the last two axes, e.g. "nm".
        groups: length of g, 1 where there is none.
        heads: H, of all groups together.
    """
    for letter, parts in MERGED.items():
        if letter in axes:
            axis = axes.index(letter)
            sizes = (-1, heads) if parts == "bh" else (heads, -1)
            tensor = torch.unflatten(tensor, axis, sizes)
            axes = axes.replace(letter, parts)
    for axis in reversed(range(len(axes))):
        if axes[axis] == "1":
            tensor, axes = tensor.squeeze(axis), axes[:axis] + axes[axis + 1 :]
    target = ("bgh" if groups > 1 else "bh") + last_two
    for letter in target:
        if letter not in axes:
            tensor, axes = tensor.unsqueeze(-1), axes + letter
    order = [axes.index(letter) for letter in target]
    if order != sorted(order):
        tensor = tensor.permute(order)
    if groups > 1:
        return tensor.expand(-1, groups, heads // groups, -1, -1).flatten(1, 2)
    return tensor


def restore(tensor: Tensor, axes: str, last_two: str, groups: int, heads: int) -> Tensor:
    """Undo `arrange`: (B, H, ...) with the axes `last_two` at its end to the layout `axes`."""
    source = "bh" + last_two
    if groups > 1:
        source = "bgh" + last_two
        tensor = torch.unflatten(tensor, 1, (groups, heads // groups))
    target = axes.replace("1", "")
    for letter, parts in MERGED.items():
        target = target.replace(letter, parts)
    for letter in source:
        if letter not in target:
            tensor = tensor.squeeze(source.index(letter))
            source = source.replace(letter, "")
    order = [source.index(letter) for letter in target]
    if order != sorted(order):
        tensor = tensor.permute(order)
    for letter in MERGED:
        if letter in axes:
            start = axes.replace("1", "").index(letter)
            tensor = tensor.flatten(start, start + 1)
    for axis, letter in enumerate(axes):
        if letter == "1":
            tensor = tensor.unsqueeze(axis)
    return tensor


def align(tensor: Tensor, axes: str, target: str) -> Tensor:
    """Return a tensor in another layout, in which it broadcasts: an axis that it lacks becomes one of length 1.

    Args:
        tensor: of the layout `axes`.
        axes: its letters; any but those of merged axes.
        target: letters of the result, all of the tensor's among them, merged or not.
    """
    for axis in reversed(range(len(axes))):
        if axes[axis] == "1":
            tensor, axes = tensor.squeeze(axis), axes[:axis] + axes[axis + 1 :]
    order = [axes.index(part) for letter in target if letter != "1" for part in MERGED.get(letter, letter)]
    if order != sorted(order):
        tensor = tensor.permute(order)
    for axis, letter in enumerate(target):
        if letter == "1":
            tensor = tensor.unsqueeze(axis)
        elif letter in MERGED:
            tensor = tensor.flatten(axis, axis + 1)
    return tensor


def score_factor(site: Site, dtype: torch.dtype, form: Form = "scores") -> Tensor | None:
    """Return the factor (H, 1, 1) from q.k, or from what the scores node holds, to scores; None where all are 1."""
    product = site.wiring.product
    of_product = product is not None and (product.is_scores or form == "points")
    factor = product.score_scale if product is not None and of_product else site.loop.scale
    if bool(((factor - 1).abs() < UNIT_TOLERANCE).all()):
        return None
    return factor.to(dtype).reshape(-1, 1, 1)


def site_inputs(site: Site, tensors: Sequence[Tensor], factor: Tensor | None, form: Form = "scores") -> Inputs:
    """Return the arguments of a site's operator.

    In the form "points" the scores among the operands are a single row, that of a zero query.

    Args:
        site: the site.
        tensors: values of `Wiring.operands`, in that order, in the graph's own layout.
        factor: of the site, from `score_factor`; passed in, since it is not traced.
        form: of the scores, see `Form`; forms other than "scores" need a product.
    """
    arranged = arrange_operands(site, tensors)
    product, attention = site.wiring.product, site.wiring.attention
    values = None if attention is None else arranged[attention.value]
    if product is None:
        scores = arranged[site.wiring.scores] if form == "kernel" else true_scores(site, arranged, factor)
        return Inputs(scores, values=values)
    queries, keys = arranged[product.query], arranged[product.key]
    if form != "points" and not product.is_scores:
        return Inputs(true_scores(site, arranged, factor), queries, keys, values)
    scaled = queries if factor is None else (queries * factor).to(queries.dtype)
    if form == "scores":
        return Inputs(scaled @ keys.transpose(-1, -2), queries, keys, values)
    if form == "turned":
        return Inputs(keys @ scaled.transpose(-1, -2), queries, keys, values)
    if product.is_scores:
        return Inputs(scaled, queries, keys, values)
    scale = site.loop.scale.to(site.wiring.dtype).reshape(-1, 1, 1)
    live = (true_scores(site, arranged, scale) >= MIN_LIVE).to(site.wiring.dtype)
    return Inputs(scaled, queries, keys, values, live)


def true_scores(site: Site, arranged: Mapping[Operand, Tensor], factor: Tensor | None) -> Tensor:
    """Return the scores among the operands of a site times a factor, their logarithm where the node holds exp of it."""
    scores = arranged[site.wiring.scores]
    scores = scores.log() if site.wiring.exponential else scores
    return scores if factor is None else scores * factor


def arrange_operands(site: Site, tensors: Sequence[Tensor]) -> dict[Operand, Tensor]:
    """Return the operands of a site as (B, H, ...)."""
    wiring, heads = site.wiring, site.loop.merged_heads
    rest = iter(tensors)
    arranged: dict[Operand, Tensor] = {}
    batch: int | torch.SymInt | None = None  # known from the first operand that is not shared

    def take(operand: Operand, last_two: str) -> None:
        nonlocal batch
        tensor = arrange(next(rest), operand.axes, last_two, wiring.groups, heads)
        if not is_shared(operand):
            batch = tensor.shape[0]
            tensor = tensor if set(operand.axes) & set("hzy") else tensor.expand(-1, heads, -1, -1)
        elif batch is not None:
            tensor = tensor.expand(batch, heads, -1, -1)
        arranged[operand] = tensor

    if not wiring.scores_are_product:
        take(wiring.scores, "nm")
    if wiring.product is not None:
        query, key = wiring.product.query, wiring.product.key
        take(query, "nd")
        take(key, "md")
        if wiring.scores_are_product and is_shared(query):  # the batch was unknown before the keys
            arranged[query] = arranged[query].expand(arranged[key].shape[0], heads, -1, -1)
    if wiring.attention is not None:
        take(wiring.attention.value, "me")
    return arranged


def is_shared(operand: Operand) -> bool:
    """Return whether an operand is the same for all samples."""
    return not set(operand.axes) & set("bzy")


def positions(shape: Sequence[int]) -> Tensor:
    """Return a tensor of the shape that holds the position of each entry."""
    return torch.arange(int(torch.Size(shape).numel())).reshape(tuple(shape))


def follow_axes(places: Tensor, axes: str, shape: Sequence[int]) -> str | None:
    """Return the letters of the axes of a tensor of positions; None where more than whole axes moved.

    Args:
        places: positions in a source tensor, moved as the tensor was.
        axes: letters of the source's axes.
        shape: the source's shape.
    """
    strides = dict(zip(axes, positions(shape).stride(), strict=True))
    sizes = dict(zip(axes, shape, strict=True))
    if int(places[(0,) * places.dim()]) != 0:  # a part was cut off
        return None
    letters = ""
    total = torch.zeros((), dtype=torch.long)
    for axis, size in enumerate(places.shape):
        along = places[tuple(slice(None) if i == axis else 0 for i in range(places.dim()))]
        total = total + along.reshape([-1 if i == axis else 1 for i in range(places.dim())])
        letters += "1" if size == 1 else name_axis(along, strides, sizes) or "?"
    return None if "?" in letters or not torch.equal(total, places) else letters


def name_axis(along: Tensor, strides: Mapping[str, int], sizes: Mapping[str, int]) -> str | None:
    """Return the letter of an axis along which positions grow like this; None if no axis fits."""
    for letter in strides:
        if letter != "1" and torch.equal(along, torch.arange(sizes[letter]) * strides[letter]):
            return letter
    for letter, parts in MERGED.items():
        if set(parts) <= set(strides):
            outer, inner = (torch.arange(sizes[part]) * strides[part] for part in parts)
            if torch.equal(along, (outer[:, None] + inner).flatten()):
                return letter
    return None


def invert(places: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Return for each entry of the source its position in the result; None where the two do not match one to one."""
    if places.numel() != torch.Size(shape).numel():
        return None
    back = torch.full((places.numel(),), -1)
    back[places.flatten()] = torch.arange(places.numel())
    return None if bool((back < 0).any()) else back.reshape(tuple(shape))


def loosen_views(new: Node) -> None:
    """Turn the views after a new node into reshapes: they were traced for tensors of another memory layout."""
    for node in new.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        if new < node:
            node.target = torch.ops.aten.reshape.default
