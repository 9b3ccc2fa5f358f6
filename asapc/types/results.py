"""What verifying and measuring find out: frozen, and without logic of their own."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from asapc.types.costs import CostModel


@dataclass(frozen=True)
class SiteFidelity:
    """The fidelity of one site's operator, alone, on the teacher's own held-out activations.

    Attributes:
        relc: error of the attention output over the norm of the token-centred teacher output.
        plan_tv: total variation between the rows of the two plans, mean.
        row_marginal_error: |row sum - 1|, mean.
        column_marginal_error: |column sum / (N / M) - 1|, mean.
    """

    relc: float
    plan_tv: float
    row_marginal_error: float
    column_marginal_error: float


@dataclass(frozen=True)
class Metric:
    """A metric on labels, in [0, 1], of the teacher and of the compiled model."""

    name: str
    teacher: float
    compiled: float


@dataclass(frozen=True)
class Hop:
    """The difference that one step of the compilation makes on held-out samples, to whichever output it is largest.

    Attributes:
        name: "capture" (from the model as loaded to its graph), "amortisation" (operators replace loops), "activations"
            (ReLU networks replace smooth activations, on request), "export" (to ONNX Runtime), "precision" (to that
            of the engine, where it is not float32), or "engine" (to TensorRT, where there is a GPU to run it).
        max_abs: largest absolute difference.
        rel: norm of the difference over the norm of the reference output.
        agreement: share of samples whose first output has the same argmax; None where it has no class axis.
    """

    name: str
    max_abs: float
    rel: float
    agreement: float | None


@dataclass(frozen=True)
class VariantFidelity:
    """Fidelity of one way to run the model, end to end; see `Hop` for the fields.

    `logits_rel` is None where the output is not finite; `metric` is the variant's own, where there are labels.
    """

    logits_rel: float | None
    agreement: float | None
    metric: float | None


@dataclass(frozen=True)
class Fidelity:
    """Fidelity of a compiled model on held-out samples.

    Attributes:
        samples: number of held-out samples.
        logits_rel, agreement, metric: end to end, from the model as loaded to the last hop.
        outputs: the relative error of every floating output end to end, by its name.
        hops: the same difference step by step.
        variants: all variants whose latency is measured, end to end, by name.
        sites: each operator alone, by the site's name; sites that were kept have none.
    """

    samples: int
    logits_rel: float
    agreement: float | None
    metric: Metric | None
    outputs: Mapping[str, float]
    hops: tuple[Hop, ...]
    variants: Mapping[str, VariantFidelity]
    sites: Mapping[str, SiteFidelity]


@dataclass(frozen=True)
class LatencyRun:
    """Latency of one model in one runtime on one device at one batch size, milliseconds a call.

    None for what so few calls do not tell.
    """

    name: str
    runtime: str
    batch: int
    p50_ms: float
    p90_ms: float | None
    p99_ms: float | None
    mean_ms: float
    std_ms: float
    samples: int
    device: str = ""


@dataclass(frozen=True)
class Clocks:
    """The state of a GPU as its driver reports it; None for what it does not report."""

    sm_mhz: float | None
    max_sm_mhz: float | None
    memory_mhz: float | None
    temperature_c: float | None
    power_w: float | None


@dataclass(frozen=True)
class GpuLatency:
    """Interleaved runs of the compiled model on a GPU, in every runtime that is there.

    Attributes:
        device: name of the GPU.
        runs: times between events on the GPU, without copies to it and from it.
        settled: whether all runtimes took the same time again and again before they were timed.
        clocks: of the GPU before and after; empty where the driver's nvidia-smi is missing.
        notes: what could not be run, and why.
    """

    device: str
    runs: tuple[LatencyRun, ...]
    settled: bool
    clocks: tuple[Clocks, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CostCheck:
    """How far estimates were from what was measured: what the compiled operators add to softmax attention.

    Attributes:
        model: the costs that the planner read.
        batch: the largest batch that was measured.
        estimated_ms: by the costs, all sites together; None where there is nothing to compare.
        measured_ms: the medians' difference.
        reason: why there is nothing to compare, else None.
    """

    model: CostModel
    batch: int
    estimated_ms: float | None = None
    measured_ms: float | None = None
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class FittedActivation:
    """A ReLU network that replaces one function.

    Attributes:
        name: as of `passes.rewrite.activations.activation`.
        module: the network.
        units: its hidden units.
        error: largest error on the range, as computed in the floats of the graph.
        low, high: the range.
        nodes: how many nodes it replaces.
    """

    name: str
    module: nn.Module
    units: int
    error: float
    low: float
    high: float
    nodes: int
