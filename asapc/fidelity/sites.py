"""How close each operator comes to its loop, alone, on the teacher's own activations."""

from collections.abc import Mapping, Sequence

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
    """Fidelity of each operator alone, on the teacher's own activations.

    Args:
        graph: the teacher.
        sites: its sites.
        operators: by the site's name; sites without one are left out.
        samples: held-out inputs.
    """
    found = candidate_fidelity(graph, sites, {name: {0: module} for name, module in operators.items()}, samples)
    return {name: of_site[0] for name, of_site in found.items()}


def candidate_fidelity(
    graph: CapturedGraph, sites: Sequence[Site], candidates: Mapping[str, Mapping[int, nn.Module]], samples: Samples
) -> dict[str, dict[int, SiteFidelity]]:
    """Fidelity of several operators for each site, each alone, in one pass; see `site_fidelity`."""
    sites = [site for site in sites if site.name in candidates]
    module = graph.program.module()
    names = {operand.node for site in sites for operand in (*site.wiring.operands, site.wiring.plan)}
    sums = {s.name: dict.fromkeys(candidates[s.name], torch.zeros(6, dtype=torch.float64)) for s in sites}
    for batch in samples.batches(BATCH):
        values = record(module, batch, names)
        for site in sites:
            for key, operator in candidates[site.name].items():
                sums[site.name][key] = sums[site.name][key] + site_errors(site, operator, values)
    return {name: {key: to_fidelity(*s.tolist()) for key, s in of_site.items()} for name, of_site in sums.items()}


def site_errors(site: Site, operator: nn.Module, values: Mapping[str, Tensor]) -> Tensor:
    """Sums over a batch, its heads and its rows, see `to_fidelity`; masked rows and columns do not count."""
    given = [values[operand.node] for operand in site.wiring.operands]
    scores, queries, keys, applied = site_inputs(site, given, score_factor(site, site.wiring.dtype))
    node, wiring = site.wiring.plan, site.wiring
    plan = arrange(values[node.node].double(), node.axes, "nm", wiring.groups, site.loop.heads)
    with torch.no_grad():
        compiled_plan = operator(scores, queries, keys).double()
        compiled = compiled_plan if applied is None else operator(scores, queries, keys, applied).double()
    if site.wiring.logarithm:
        plan, compiled_plan, compiled = plan.exp(), compiled_plan.exp(), compiled.exp()
    live = plan > 0
    rows = live.any(dim=-1, keepdim=True)
    output = plan if applied is None else plan @ applied.double()
    centred = (output - (output * rows).sum(dim=-2, keepdim=True) / rows.sum(dim=-2, keepdim=True).clamp_min(1)) * rows
    wanted, mass = (p.sum(dim=-1, keepdim=True) for p in (plan, compiled_plan))
    columns = live.any(dim=-2, keepdim=True)
    count = columns.sum(dim=-1, keepdim=True).clamp_min(1)
    share = plan.sum(dim=(-1, -2), keepdim=True) / count
    column_mass = share if site.loop.uniform else plan.sum(dim=-2, keepdim=True)
    off = torch.where(columns, (compiled_plan.sum(dim=-2, keepdim=True) / column_mass - 1).abs(), 0.0)
    off = off.sum(dim=-1, keepdim=True) / count
    typical = plan.sum(dim=-1).amax().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.stack(
        [
            ((compiled - output) * rows).square().sum(),
            centred.square().sum(),
            ((compiled_plan - plan) * rows).abs().sum() / 2 / typical,
            ((mass - wanted) * rows).abs().sum() / typical,
            (off * rows).sum(),
            rows.sum().double(),
        ]
    )


def to_fidelity(error: float, norm: float, tv: float, rows: float, columns: float, count: float) -> SiteFidelity:
    """Turn sums over samples, heads and rows into means."""
    relc = (error / norm) ** 0.5 if norm > 0 else float(error > 0)
    return SiteFidelity(relc, tv / count, rows / count, columns / count)
