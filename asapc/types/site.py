"""A Sinkhorn loop in a graph, and what was found of them.

Compared by identity: sites hold tensors, which have no single answer to "equal".

Shapes: B samples, H heads, N queries, M keys, D head size, L slices, F features. Scores and duals are in
units of the temperature: the plan is exp(scores + f + g), scores = scale * q.k.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from asapc.types.graph import EarlyStops

Axis = Literal["rows", "columns"]


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


@dataclass(frozen=True, eq=False)
class Site:
    """One Sinkhorn loop in a graph, from its scores to its plan, and where it is attention to plan @ v.

    All operators see it in one layout, whatever the graph's own: scores and plan (B, H, N, M), queries
    (B, H, N, D), keys (B, H, M, D), values (B, H, M, E).

    Attributes:
        name: path of the module it stands in, made unique; a label, never evidence.
        source: "file:line" of the user's code, or None.
        half_steps: number of half-steps T, each normalising one axis.
        last: the axis that the last half-step normalises.
        scale: (H,) factor from what the scores node holds to scores in units of the temperature, float64.
        row_mass, column_mass: (1,) or (N,) and (1,) or (M,), float64: what rows and columns of the plan are scaled
            to. That of the last axis is what its sums are, the other's matters up to a factor.
        masked: whether entries below `ops.scaling.MIN_LIVE` are left out: key padding, and padded queries.
        groups, heads: H = heads, in so many groups where the graph has two axes for them.
        queries, keys: N, M.
        head_dim: D; None where the scores are no product of queries and keys.
        dtype: of the scores.
        share: estimated share of the model's time that the loop takes, in [0, 1].
        scores: the node that the loop starts from.
        exponential: the scores node holds exp(scores): the mask or the temperature comes in after the exp.
        plan: the node that the loop ends in.
        logarithm: the plan node holds log(plan).
        query, key: operands of the product q.k that is in the scores; None where there is none.
        product: whether the scores node is that product itself.
        padding: nodes from the product to the scores, both included, where all that comes in between leaves out whole
            columns, and does so too where the product has one row; None elsewhere.
        temperature: (H,) factor from q.k to scores, float64, None where there is no product.
        folded: (H,) factor that query and key nodes carry already, of the temperature too.
        applied: whether the plan is multiplied with values: attention, not a plan alone.
        value, output: operand and result of plan @ v; None where anything else reads the plan too.
    """

    name: str
    source: str | None
    half_steps: int
    last: Axis
    scale: Tensor
    row_mass: Tensor
    column_mass: Tensor
    masked: bool
    groups: int
    heads: int
    queries: int
    keys: int
    head_dim: int | None
    dtype: torch.dtype
    share: float
    scores: Operand
    exponential: bool
    plan: Operand
    logarithm: bool
    query: Operand | None
    key: Operand | None
    product: bool
    padding: tuple[str, ...] | None
    temperature: Tensor | None
    folded: Tensor | None
    applied: bool
    value: Operand | None
    output: Operand | None

    @property
    def epsilon(self) -> list[float] | None:
        """Temperature of each head, in the convention scores = q.k / (sqrt(head_dim) * epsilon)."""
        if self.temperature is None or self.head_dim is None or self.folded is None:
            return None
        values: list[float] = (1 / (self.temperature * self.folded * self.head_dim**0.5)).tolist()
        return values

    @property
    def uniform(self) -> bool:
        """Whether all rows have one mass, and all columns one."""
        return self.row_mass.numel() == self.column_mass.numel() == 1


@dataclass(frozen=True, eq=False)
class Miss:
    """Something that looked like Sinkhorn attention and is not, or is not supported.

    Attributes:
        node: name of the node that ends the region.
        source: "file:line" of the user's code, or None.
        reason: what was expected and what was seen.
        hint: what the user can change, or that nothing is to be done.
    """

    node: str
    source: str | None
    reason: str
    hint: str


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found in a graph.

    Attributes:
        sites: in the order of the graph.
        misses: what came near.
        early_stops: those that capture left out; None where the model has none.
        untold: nodes that loops read and that are the same everywhere on the samples looked at: others may tell more.
    """

    sites: tuple[Site, ...]
    misses: tuple[Miss, ...]
    early_stops: EarlyStops | None = None
    untold: tuple[str, ...] = ()
