"""Measures how close each operator comes to its loop, alone, on the teacher's own activations."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asapc.fidelity.outputs import BATCH
from asapc.passes.layout import arrange, score_factor, site_inputs
from asapc.passes.record import record
from asapc.types.graph import CapturedGraph
from asapc.types.results import SiteFidelity
from asapc.types.samples import Samples
from asapc.types.site import Site


def site_fidelity(
    graph: CapturedGraph, sites: Sequence[Site], operators: Mapping[str, nn.Module], samples: Samples
) -> dict[str, SiteFidelity]:
    """Compare each operator alone with its loop, on the teacher's own activations.

    Args:
        graph: the teacher.
        sites: its sites.
        operators: by the site's name; sites without one are left out.
        samples: held-out inputs.
    """
    candidates = {name: {0: module} for name, module in operators.items()}
    fidelity = candidate_fidelity(graph, sites, candidates, samples)
    return {name: of_site[0] for name, of_site in fidelity.items()}


def candidate_fidelity(
    graph: CapturedGraph, sites: Sequence[Site], candidates: Mapping[str, Mapping[int, nn.Module]], samples: Samples
) -> dict[str, dict[int, SiteFidelity]]:
    """Compare several operators for each site, each alone, in one pass over the samples; see `site_fidelity`."""
    sites = [site for site in sites if site.name in candidates]
    module = graph.program.module()
    names = {operand.node for site in sites for operand in (*site.wiring.operands, site.wiring.plan)}
    sums = {site.name: dict.fromkeys(candidates[site.name], NO_ERRORS) for site in sites}
    for batch in samples.batches(graph.samples_at_once(BATCH)):
        values = record(module, batch, names)
        for site in sites:
            for key, operator in candidates[site.name].items():
                sums[site.name][key] = add(sums[site.name][key], site_errors(site, operator, values))
    return {name: {key: means(errors) for key, errors in of_site.items()} for name, of_site in sums.items()}


class SiteErrors(NamedTuple):
    """Sums over samples, heads and rows, float64; masked rows and columns do not count.

    Attributes:
        output: squared error of the attention output, or of the plan where it is not applied.
        norm: squared norm of the teacher's output, centred over the rows.
        total_variation: between the rows of the two plans.
        row_mass: absolute error of the row sums, in units of the typical one.
        column_mass: absolute error of the column sums, relative to theirs, mean over the columns; once a row.
        rows: number of rows.
    """

    output: Tensor
    norm: Tensor
    total_variation: Tensor
    row_mass: Tensor
    column_mass: Tensor
    rows: Tensor


NO_ERRORS = SiteErrors(*torch.zeros(6, dtype=torch.float64))


def add(one: SiteErrors, other: SiteErrors) -> SiteErrors:
    """Errors of the samples of both."""
    return SiteErrors(*(a + b for a, b in zip(one, other, strict=True)))


def means(errors: SiteErrors) -> SiteFidelity:
    """Turn sums into means over samples, heads and rows."""
    output, norm, total_variation, row_mass, column_mass, rows = torch.stack(errors).tolist()
    relc = (output / norm) ** 0.5 if norm > 0 else float(output > 0)
    return SiteFidelity(relc, total_variation / rows, row_mass / rows, column_mass / rows)


def site_errors(site: Site, operator: nn.Module, values: Mapping[str, Tensor]) -> SiteErrors:
    """Compare an operator with its loop on one batch.

    Args:
        site: the loop.
        operator: takes scores, queries, keys and, unless the plan itself is asked for, values.
        values: of the site's operands and of its plan, by the node's name.
    """
    wiring, loop = site.wiring, site.loop
    operands = [values[operand.node] for operand in wiring.operands]
    # In the precision of the model, as the compiled model runs it; only what is compared is float64.
    scores, queries, keys, applied = site_inputs(site, operands, score_factor(site, wiring.dtype))
    plan = arrange(values[wiring.plan.node].double(), wiring.plan.axes, "nm", wiring.groups, loop.heads)
    with torch.no_grad():
        compiled_plan = operator(scores, queries, keys).double()
        # The output is not computed from that plan: fused operators have a path of their own for values.
        compiled = compiled_plan if applied is None else operator(scores, queries, keys, applied).double()
    if wiring.logarithm:
        plan, compiled_plan, compiled = plan.exp(), compiled_plan.exp(), compiled.exp()
    output = plan if applied is None else plan @ applied.double()
    # Masked rows and columns are zero in the teacher's plan, whatever the code masks with.
    live = plan > 0
    rows, columns = live.any(dim=-1, keepdim=True), live.any(dim=-2, keepdim=True)
    row_mass, compiled_row_mass = (p.sum(dim=-1, keepdim=True) for p in (plan, compiled_plan))
    # Columns are held to uniform masses where the loop has them: its own are off too after a last step on rows.
    count = columns.sum(dim=-1, keepdim=True).clamp_min(1)
    share = plan.sum(dim=(-1, -2), keepdim=True) / count
    column_mass = share if loop.uniform else plan.sum(dim=-2, keepdim=True)
    off = torch.where(columns, (compiled_plan.sum(dim=-2, keepdim=True) / column_mass - 1).abs(), 0.0)
    off = off.sum(dim=-1, keepdim=True) / count
    # The largest row sum, since masked rows and those of other marginals sum to less.
    typical = plan.sum(dim=-1).amax().clamp_min(torch.finfo(torch.float64).tiny)
    return SiteErrors(
        output=((compiled - output) * rows).square().sum(),
        norm=centre(output, rows).square().sum(),
        total_variation=((compiled_plan - plan) * rows).abs().sum() / 2 / typical,
        row_mass=((compiled_row_mass - row_mass) * rows).abs().sum() / typical,
        column_mass=(off * rows).sum(),
        rows=rows.sum().double(),
    )


def centre(output: Tensor, rows: Tensor) -> Tensor:
    """Outputs (B, H, N, E) less their mean over the live rows (B, H, N, 1): what a mean of the values would miss."""
    return (output - (output * rows).sum(dim=-2, keepdim=True) / rows.sum(dim=-2, keepdim=True).clamp_min(1)) * rows
