"""Measures how close each operator comes to its loop, alone, on the teacher's own activations."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from asapc.backends.base import RememberingRunner
from asapc.fidelity.outputs import BATCH
from asapc.passes.layout import Inputs, arrange, score_factor, site_inputs
from asapc.passes.record import record, record_with_outputs
from asapc.types.graph import CapturedGraph
from asapc.types.results import SiteFidelity
from asapc.types.samples import Samples
from asapc.types.site import Site

Key = TypeVar("Key", bound=Hashable)  # what a caller calls the operators of a site
# Up to this share of an output errors are float32's own. Where rows differ by no more, they are no measure of an error:
# all are given the same, as at the first layer of hyper-connections, whose streams start as copies.
ROUNDING = 2e-6


def site_fidelity(
    graph: CapturedGraph,
    sites: Sequence[Site],
    operators: Mapping[str, nn.Module],
    samples: Samples,
    runner: RememberingRunner | None = None,
) -> dict[str, SiteFidelity]:
    """Compare each operator alone with its loop, on the teacher's own activations.

    Args:
        graph: the teacher.
        sites: its sites.
        operators: by the site's name; sites without one are left out.
        samples: held-out inputs.
        runner: of the graph; told the outputs, which come up on the way.
    """
    candidates = {name: {0: module} for name, module in operators.items()}
    fidelity = candidate_fidelity(graph, sites, candidates, samples, runner)
    return {name: of_site[0] for name, of_site in fidelity.items()}


def candidate_fidelity(
    graph: CapturedGraph,
    sites: Sequence[Site],
    candidates: Mapping[str, Mapping[Key, nn.Module]],
    samples: Samples,
    runner: RememberingRunner | None = None,
) -> dict[str, dict[Key, SiteFidelity]]:
    """Compare several operators for each site, each alone, in one pass over the samples; see `site_fidelity`."""
    sites = [site for site in sites if site.name in candidates]
    module = graph.program.module()
    names = {operand.node for site in sites for operand in (*site.wiring.operands, site.wiring.plan)}
    sums = {site.name: dict.fromkeys(candidates[site.name], NO_ERRORS) for site in sites}
    for batch in samples.batches(graph.samples_at_once(BATCH)):
        if runner is None:
            values = record(module, batch, names)
        else:
            values, outputs = record_with_outputs(module, batch, names)
            runner.remember(batch, outputs)
        for site in sites:
            reference = Reference.of(site, values)
            for key, operator in candidates[site.name].items():
                sums[site.name][key] = add(sums[site.name][key], site_errors(site, operator, reference))
    return {name: {key: means(errors) for key, errors in of_site.items()} for name, of_site in sums.items()}


class SiteErrors(NamedTuple):
    """Sums over samples, heads and rows, float64; masked rows and columns do not count.

    Attributes:
        output: squared error of the attention output, or of the plan where it is not applied.
        norm: squared norm of the teacher's output, centred over the rows.
        whole: the same, not centred.
        total_variation: between the rows of the two plans.
        row_mass: absolute error of the row sums, in units of the typical one.
        column_mass: absolute error of the column sums, relative to theirs, mean over the columns; once a row.
        rows: number of rows.
    """

    output: Tensor
    norm: Tensor
    whole: Tensor
    total_variation: Tensor
    row_mass: Tensor
    column_mass: Tensor
    rows: Tensor


NO_ERRORS = SiteErrors(*torch.zeros(len(SiteErrors._fields), dtype=torch.float64))


def add(one: SiteErrors, other: SiteErrors) -> SiteErrors:
    """Return the errors of the samples of both."""
    return SiteErrors(*(a + b for a, b in zip(one, other, strict=True)))


def means(errors: SiteErrors) -> SiteFidelity:
    """Turn sums into means over samples, heads and rows."""
    output, norm, whole, total_variation, row_mass, column_mass, rows = torch.stack(errors).tolist()
    if max(output, norm) <= ROUNDING**2 * whole:
        relc = 0.0
    else:
        relc = (output / norm) ** 0.5 if norm > 0 else 1.0
    return SiteFidelity(relc, total_variation / rows, row_mass / rows, column_mass / rows)


@dataclass(frozen=True, eq=False)
class Reference:
    """What the loop of a site makes of one batch, to compare operators with; wide are float32 or the model's own type.

    Attributes:
        inputs: the operator's, in the precision of the model.
        plan: (B, H, N, M), wide; of a plan that stays a logarithm, its exp.
        output: plan @ values (B, H, N, E), or the plan, float64.
        rows, columns: which of them are live, (B, H, N, 1) and (B, H, 1, M).
        row_mass, column_mass: the plan's own sums of rows; what columns are held to; float64.
    """

    inputs: Inputs
    plan: Tensor
    output: Tensor
    rows: Tensor
    columns: Tensor
    row_mass: Tensor
    column_mass: Tensor

    @classmethod
    def of(cls, site: Site, values: Mapping[str, Tensor]) -> "Reference":
        """Read the loop off the values of the site's operands and of its plan, by the node's name."""
        wiring, loop = site.wiring, site.loop
        operands = [values[operand.node] for operand in wiring.operands]
        # In the precision of the model, as the compiled model runs it.
        inputs = site_inputs(site, operands, score_factor(site, wiring.dtype))
        plan = widen(arrange(values[wiring.plan.node], wiring.plan.axes, "nm", wiring.groups, loop.merged_heads))
        plan = plan.exp() if wiring.logarithm else plan
        output = plan.double() if inputs.values is None else plan.double() @ inputs.values.double()
        # Masked rows and columns are zero in the teacher's plan, whatever the code masks with.
        rows, columns = (plan.amax(dim=dim, keepdim=True) > 0 for dim in (-1, -2))
        row_mass, column_mass = (plan.sum(dim=dim, keepdim=True).double() for dim in (-1, -2))
        if loop.uniform:
            # Columns are held to uniform masses: their own are off too after a last step on rows.
            column_mass = row_mass.sum(dim=-2, keepdim=True) / columns.sum(dim=-1, keepdim=True).clamp_min(1)
        return cls(inputs, plan, output, rows, columns, row_mass, column_mass)


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 where its own type is narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def site_errors(site: Site, operator: nn.Module, loop: Reference) -> SiteErrors:
    """Compare an operator with its loop on one batch.

    Args:
        site: the site.
        operator: takes scores, queries, keys and, unless the plan itself is asked for, values.
        loop: what it is compared with.
    """
    scores, queries, keys, applied, _ = loop.inputs
    with torch.no_grad():
        plan = widen(operator(scores, queries, keys))
        if applied is None:
            output = plan
        elif getattr(operator, "lowering", None) in ("materialised", "interleaved"):
            output = plan @ applied.to(plan.dtype)
        else:  # fused operators have a path of their own for values
            output = operator(scores, queries, keys, applied)
    if site.wiring.logarithm:
        plan, output = plan.exp(), output.exp()
    count = loop.columns.sum(dim=-1, keepdim=True).clamp_min(1)
    row_mass, column_mass = (plan.sum(dim=dim, keepdim=True).double() for dim in (-1, -2))
    off = torch.where(loop.columns, (column_mass / loop.column_mass - 1).abs(), 0.0).sum(dim=-1, keepdim=True) / count
    # The largest row sum, since masked rows and those of other marginals sum to less.
    typical = loop.row_mass.amax().clamp_min(torch.finfo(torch.float64).tiny)
    return SiteErrors(
        output=((output.double() - loop.output) * loop.rows).square().sum(),
        norm=centre(loop.output, loop.rows).square().sum(),
        whole=(loop.output * loop.rows).square().sum(),
        total_variation=((plan - loop.plan).abs_().sum(dim=-1, keepdim=True) * loop.rows).double().sum() / 2 / typical,
        row_mass=((row_mass - loop.row_mass) * loop.rows).abs().sum() / typical,
        column_mass=(off * loop.rows).sum(),
        rows=loop.rows.sum().double(),
    )


def centre(output: Tensor, rows: Tensor) -> Tensor:
    """Subtract from outputs (B, H, N, E) their mean over live rows (B, H, N, 1), which a mean of the values gives."""
    return (output - (output * rows).sum(dim=-2, keepdim=True) / rows.sum(dim=-2, keepdim=True).clamp_min(1)) * rows
