"""Operators that can replace a site, and which were selected: data alone.

Shapes as in `types.site`, and F features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import Tensor

from asapc.types.budget import Term
from asapc.types.options import Lowering, OperatorKind
from asapc.types.results import SiteFidelity

Operator = Literal["keep", "exact", "truncated", "sliced_dual", "amortised"]
Side = Literal["queries", "keys"]


@dataclass(frozen=True, eq=False)
class Regression:
    """Sufficient statistics of one least-squares problem per head; float64, both centred over the points of a sample.

    Attributes:
        gram: (H, F, F) sum over samples and points of products of features.
        moment: (H, F) sum of feature times target.
        energy: (H,) sum of the target's square.
        count: () number of summed terms (samples * points).
    """

    gram: Tensor
    moment: Tensor
    energy: Tensor
    count: Tensor


class FeatureSet(NamedTuple):
    """The features that a dual is estimated from, beside a parabola for each coordinate and the mean of the other side.

    Attributes:
        slices: number of coordinates whose exact potential is taken, by sorting.
        pieces: linear pieces that hinges give the first coordinates; 0 for no hinges.
        side: the points whose dual it is.
        paired: whether products of two coordinates are features.
        one_pass: whether the dual is that of the loop's end, from which one half-step gives the plan.
    """

    slices: int = 0
    pieces: int = 0
    side: Side = "keys"
    paired: bool = False
    one_pass: bool = False

    @property
    def kind(self) -> OperatorKind:
        """What `--operators` calls operators with these features."""
        if self.one_pass:
            return "one-pass"
        return "sorted" if self.slices else "hinges"


@dataclass(frozen=True, eq=False)
class SlicedDualParams:
    """The parameters of the sliced-dual operator of one site.

    Attributes:
        query_basis, key_basis: (H, D, C) directions of C coordinates, so that (q @ query_basis).(k @ key_basis) is
            as much of the score, without any bias, as C products can carry.
        slices: number of slices L, the first columns of the bases.
        knots: (H, K, P) places of P hinges in each of the first K coordinates, in standard deviations; K may be 0.
        weights: linear maps to the dual. The first is (H, F), over the features of
            `ops.features.dual_features`; each further one is a fitted closure step, (H, F + 1),
            (H, F + 2) ..., over the features and the closures so far. Empty before the fit.
        side: the points whose dual is estimated.
        paired: whether there are features of pairs of coordinates.
        one_pass: whether the dual is that of the loop's end; then there is one linear map.
        doubling: for each linear map, the share of its error that twice as many samples would take off, predicted; none
            where it cannot be told.
    """

    query_basis: Tensor
    key_basis: Tensor
    slices: int
    knots: Tensor
    weights: tuple[Tensor, ...] = ()
    side: Side = "keys"
    paired: bool = False
    one_pass: bool = False
    doubling: tuple[float, ...] = ()

    @property
    def features(self) -> list[str]:
        """Names of the functions that the dual is estimated from."""
        optional = {"slices": self.slices > 0, "pairs": self.paired, "hinges": self.knots.numel() > 0}
        return ["parabola", "mean", *(name for name, present in optional.items() if present)]


class AmortisedParams(NamedTuple):
    """The network of an amortised operator, from the scores of a small plan, row by row, to the dual of one axis.

    A ReLU stands after each layer but the last. The means over what the dual is added to are taken away from its end.

    Attributes:
        weights: of each layer, (outputs, inputs).
        biases: of each layer, (outputs,).
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def one_of(self, number: int) -> "AmortisedParams":
        """Return one network, detached, of several whose layers are stacked."""
        return AmortisedParams(*(tuple(value[number].detach().clone() for value in values) for values in self))

    @property
    def ends(self) -> tuple[int, int] | None:
        """How many scores the network takes, and how many entries its dual has; None if its layers do not fit."""
        shapes = [weight.shape for weight in self.weights]
        inner = all(after[-1:] == before[:1] for before, after in pairwise(shapes))
        biases = [bias.shape for bias in self.biases] == [shape[:1] for shape in shapes]
        plain = all(len(shape) == 2 for shape in shapes)
        return (shapes[0][1], shapes[-1][0]) if plain and inner and biases else None


@dataclass(frozen=True, eq=False)
class Candidate:
    """An operator that could replace one site.

    Attributes:
        operator: "keep" leaves the site as it is, "exact" is the scaling form of the same half-steps,
            "truncated" the scaling form of fewer, "sliced_dual" the fitted approximation, "amortised" a network before
            few half-steps on small plans (`ops.amortised`).
        half_steps: half-steps over the scores that the operator takes.
        cost: estimated milliseconds at the largest batch; infinite for a loop as it was written.
        fidelity: on calibration samples that were not fitted; None where it was not measured.
        params: what was fitted, of a sliced dual or an amortised operator; else None.
        lowering: "materialised" computes the scores once, as a matrix, and works on that; "interleaved" does so on
            small matrices, the same entry of all side by side (`ops.small`); "fused" calls the runtime's fused
            attention for each half-step, without a matrix (`ops.fused`).
    """

    operator: Operator
    half_steps: int
    cost: float
    fidelity: SiteFidelity | None = None
    params: SlicedDualParams | AmortisedParams | None = None
    lowering: Lowering = "materialised"


@dataclass(frozen=True, eq=False)
class Choice:
    """The operator that was selected for one site, and the alternatives.

    Attributes:
        candidate: the operator.
        reason: why this one.
        front: the candidates that no other beats in both cost and error, cheapest first.
    """

    candidate: Candidate
    reason: str
    front: tuple[Candidate, ...] = ()


@dataclass(frozen=True, eq=False)
class Alternatives:
    """What the planner chooses among, at all sites.

    Attributes:
        candidates: by the site's name, the exact form first; with cost and fidelity.
        wide, ranges: as of `Selection`.
    """

    candidates: Mapping[str, Sequence[Candidate]]
    wide: frozenset[str] = frozenset()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Cheaper:
    """The next cheaper selection, and why it was not taken.

    Attributes:
        candidates: its operators where they are other ones, by the site's name.
        cost: estimated milliseconds of its operators at all sites, at the largest batch.
        held_out: whether the whole model missed the terms on held-out samples; else the sites did, on calibration
            samples that were not fitted.
        missed: the terms of the budget that it misses.
        margin: share of a limit that had to be kept.
    """

    candidates: Mapping[str, Candidate]
    cost: float
    held_out: bool
    missed: tuple[Term, ...]
    margin: float = 1.0


@dataclass(frozen=True, eq=False)
class Selection:
    """The compiler's choice of operators: one for each site, by the site's name.

    Attributes:
        choices: by the site's name.
        wide: sites whose scores spread so far that the scaling form has to level its kernel twice, see `ops.scaling`.
        ranges: least and largest standard deviation of a calibration sample's scores, see `planning.ranges.ScoreRange`.
        repairs: how often a site got a closer operator because the whole model missed the budget on held-out samples.
        cheaper: the next cheaper selection; None where there is none, or its cost is not known.
    """

    choices: Mapping[str, Choice]
    wide: frozenset[str] = frozenset()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    repairs: int = 0
    cheaper: Cheaper | None = None

    @property
    def cost(self) -> float:
        """Estimated milliseconds of the operators at the largest batch; infinite where a loop is kept."""
        return sum(choice.candidate.cost for choice in self.choices.values())


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """What one selection costs and keeps.

    Attributes:
        selection: the operators.
        cost: their estimated milliseconds at the largest batch; infinite where a loop is kept.
        reached: what the whole model reaches on held-out samples, by the metrics that a budget can name; None for those
            that cannot be judged.
        term: the budget that gives this selection; None where no single term does.
        chosen: whether it is what the options ask for.
    """

    selection: Selection
    cost: float
    reached: Mapping[str, float | None]
    term: str | None
    chosen: bool


AMORTISED_LAYERS = 3  # of every network
SIDES: tuple[Side, Side] = ("queries", "keys")  # in the order of `Activations`
