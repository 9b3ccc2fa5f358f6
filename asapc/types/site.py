"""Sinkhorn loops in a graph.

Compared by identity: sites hold tensors, for which == is not one answer.

Shapes: B samples, H heads, N queries, M keys, D head size, L slices, F features. Scores and duals are in
units of the temperature: the plan is exp(scores + f + g), scores = scale * q.k.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import torch
from torch import Tensor

from asapc.types.graph import EarlyStops

Axis = Literal["rows", "columns"]
SMALL = 64  # entries of plans that count by their number and not by their size


@dataclass(frozen=True)
class Operand:
    """A node of a graph, and what its axes stand for.

    Attributes:
        node: its name.
        axes: one letter an axis. b samples; h heads, or g groups of heads and h heads in a group; n queries, m keys;
            d head size, e value size; 1 an axis of length 1. z is b and h in one axis, sample by sample, y is
            the same, head by head.
    """

    node: str
    axes: str

    def renamed(self, names: Mapping[str, str]) -> "Operand":
        """Return the operand in another graph, by the names that nodes have there."""
        return Operand(names[self.node], self.axes)


@dataclass(frozen=True)
class Floor:
    """A constant that keeps a sum from zero where it is divided by.

    Attributes:
        constant: the constant, positive.
        clamped: whether the divisor is no less than the constant; else it is added to the sum.
    """

    constant: float
    clamped: bool


@dataclass(frozen=True)
class Guard:
    """The constants that keep the divisors of a loop from zero, and what they are.

    With it no factor of a row or column cancels out any more: it matters what the kernel is and what the masses are.

    Attributes:
        rows, columns: what the sums of each have, None for nothing; one of the two has something.
        divides: what is divided: the plan so far, by its own sums, or the masses, by the sums of the kernel scaled on
            the other axis.
        kernel: what the first half-step finds: exponentials of the scores, as they are, less the largest along its axis
            or less the largest of all; or their softmax along that axis, the first half-step without a constant.
        other_mass: what the axis is scaled to that is not normalised last: each row or column to 1, or so that rows
            and columns have the same total.
        total: masses within the loop, against those of the plan in the end: the same, or divided by the number of
            rows or columns.
    """

    rows: Floor | None
    columns: Floor | None
    divides: Literal["plan", "masses"]
    kernel: Literal["plain", "softmax", "first", "matrix"]
    other_mass: Literal["one", "balanced"]
    total: Literal["same", "rows", "columns"]


@dataclass(frozen=True, eq=False)
class Loop:
    """The mathematics of a site: rows and columns of exp(scale * scores) are scaled to fixed masses by turns.

    Attributes:
        half_steps: number of half-steps T, each normalising one axis.
        last: the axis that the last half-step normalises.
        heads, queries, keys: H, N, M of the plan (B, H, N, M).
        scale: (H,) factor from what the scores node holds to scores in units of the temperature, float64; (1,) where
            the number of heads is open.
        row_mass, column_mass: (1,) or (N,) and (1,) or (M,), float64: what rows and columns of the plan are scaled
            to. That of the last axis is what its sums are, the other's matters up to a factor.
        masked: whether entries below `ops.scaling.MIN_LIVE` are left out: key padding, and padded queries.
        guard: the constants that keep divisors from zero and act on up to 100 times the samples' scores; None where
            none does, or where no guard explains how they act.
        reach: up to how many times the samples' scores the model computes this loop without its guard; infinite where
            there is none.
        open_lengths: whether N or M follow an open axis.
    """

    half_steps: int
    last: Axis
    heads: int
    queries: int
    keys: int
    scale: Tensor
    row_mass: Tensor
    column_mass: Tensor
    masked: bool
    guard: Guard | None = None
    reach: float = inf
    open_lengths: bool = False

    @property
    def exact(self) -> bool:
        """Whether the loop, with its guard, is the model's on all scores."""
        return self.guard is not None or self.reach == inf

    @property
    def small(self) -> bool:
        """Whether the plan has few entries at every length, as where each token has one of its own."""
        return not self.open_lengths and self.queries * self.keys <= SMALL

    @property
    def open_heads(self) -> bool:
        """Whether the number of heads follows an open axis, as where each token has a matrix of its own."""
        return self.scale.numel() < self.heads

    @property
    def merged_heads(self) -> int:
        """How many heads an axis of samples and heads holds: where they are open one, and all else are samples."""
        return 1 if self.open_heads else self.heads

    @property
    def uniform(self) -> bool:
        """Whether all rows have one mass, and all columns one."""
        return self.row_mass.numel() == self.column_mass.numel() == 1


@dataclass(frozen=True, eq=False)
class DotProduct:
    """The product of queries and keys that is in the scores.

    Attributes:
        query, key: its operands.
        head_dim: D.
        score_scale: (H,) factor from q.k to scores in units of the temperature, float64.
        folded: (H,) factor of the temperature that query and key nodes carry already.
        is_scores: whether the scores node is that product itself.
        padding: nodes from the product to the scores, both included, where all that comes in between leaves out whole
            columns, and does so too where the product has one row; None elsewhere.
    """

    query: Operand
    key: Operand
    head_dim: int
    score_scale: Tensor
    folded: Tensor
    is_scores: bool
    padding: tuple[str, ...] | None

    @property
    def epsilon(self) -> list[float]:
        """Temperature of each head, in the convention scores = q.k / (sqrt(head_dim) * epsilon)."""
        values: list[float] = (1 / (self.score_scale * self.folded * self.head_dim**0.5)).tolist()
        return values

    def renamed(self, names: Mapping[str, str]) -> "DotProduct":
        """Return the product in another graph, by the names that nodes have there."""
        padding = None if self.padding is None else tuple(names[node] for node in self.padding)
        return replace(self, query=self.query.renamed(names), key=self.key.renamed(names), padding=padding)


@dataclass(frozen=True)
class Attention:
    """The product plan @ values.

    Attributes:
        value: the values.
        output: the result.
    """

    value: Operand
    output: Operand

    def renamed(self, names: Mapping[str, str]) -> "Attention":
        """Return the product in another graph, by the names that nodes have there."""
        return Attention(self.value.renamed(names), self.output.renamed(names))


@dataclass(frozen=True, eq=False)
class Wiring:
    """Where a site stands in its graph: nodes, and what their axes are.

    Attributes:
        scores: the node that the loop starts from.
        plan: the node that the loop ends in.
        dtype: of the scores.
        groups: number of groups that the graph has the heads in, on an axis of their own where there are several.
        exponential: the scores node holds exp(scores): the mask or the temperature comes in after the exp.
        logarithm: the plan node holds log(plan).
        product: the product of queries and keys that is in the scores; None where there is none.
        attention: the product with values that reads the plan; None where anything else reads the plan too.
        applied: whether the plan is multiplied with values: attention, not a plan alone.
    """

    scores: Operand
    plan: Operand
    dtype: torch.dtype
    groups: int
    exponential: bool
    logarithm: bool
    product: DotProduct | None
    attention: Attention | None
    applied: bool

    @property
    def scores_are_product(self) -> bool:
        """Whether the scores node is the product of queries and keys itself, so that an operator can compute it."""
        return self.product is not None and self.product.is_scores

    @property
    def operands(self) -> list[Operand]:
        """What the operator of the site reads: scores unless they are the product, queries, keys, values."""
        operands = [] if self.scores_are_product else [self.scores]
        if self.product is not None:
            operands += [self.product.query, self.product.key]
        return operands if self.attention is None else [*operands, self.attention.value]

    @property
    def result(self) -> Operand:
        """The node that the operator of the site replaces."""
        return self.plan if self.attention is None else self.attention.output

    def renamed(self, names: Mapping[str, str]) -> "Wiring":
        """Return the wiring in another graph, by the names that nodes have there."""
        return replace(
            self,
            scores=self.scores.renamed(names),
            plan=self.plan.renamed(names),
            product=None if self.product is None else self.product.renamed(names),
            attention=None if self.attention is None else self.attention.renamed(names),
        )


@dataclass(frozen=True, eq=False)
class Site:
    """One Sinkhorn loop in a graph, from its scores to its plan, and where it is attention to plan @ v.

    All operators see it in one layout, whatever the graph's own: scores and plan (B, H, N, M), queries
    (B, H, N, D), keys (B, H, M, D), values (B, H, M, E).

    Attributes:
        name: path of the module it stands in, made unique; a label, never evidence.
        source: "file:line" of the user's code, or None.
        share: estimated share of the model's time that the loop takes, in [0, 1].
        loop: the mathematics.
        wiring: the nodes.
    """

    name: str
    source: str | None
    share: float
    loop: Loop
    wiring: Wiring

    @property
    def head_dim(self) -> int | None:
        """D; None where the scores are no product of queries and keys."""
        return None if self.wiring.product is None else self.wiring.product.head_dim

    @property
    def epsilon(self) -> list[float] | None:
        """Temperature of each head, see `DotProduct.epsilon`; None where the scores are no product."""
        return None if self.wiring.product is None else self.wiring.product.epsilon


@dataclass(frozen=True, eq=False)
class Miss:
    """A near miss: something like Sinkhorn attention that is none, or is not supported.

    Attributes:
        node: name of the node that ends the region.
        source: "file:line" of the user's code, or None.
        reason: what was expected and what was observed.
        hint: what the user can change, or that there is nothing to change.
        nearness: how near it came to a loop; a number that means something beside that of another miss only.
    """

    node: str
    source: str | None
    reason: str
    hint: str
    nearness: float = 0.0


@dataclass(frozen=True, eq=False)
class Findings:
    """Sites and near misses of a graph.

    Attributes:
        sites: in the order of the graph.
        misses: the near misses, the nearest first.
        early_stops: those that capture omitted; None where the model has none.
        untold: nodes that loops read and that are the same everywhere on these samples: others may say more.
    """

    sites: tuple[Site, ...]
    misses: tuple[Miss, ...]
    early_stops: EarlyStops | None = None
    untold: tuple[str, ...] = ()
