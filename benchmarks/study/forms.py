"""What may stand in the place of a teacher's loops: a module for each site, by the site's name.

All are called as asapc's operators are, on scores, queries, keys and values. Tasks without padding alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asapc.config import CompileConfig
from asapc.models.sinkhorn import Sinkhorn
from asapc.models.sliced import SlicedTransport
from asapc.planning.cache import cache_of
from asapc.planning.calibrate import to_dtype
from asapc.planning.choose import choose
from asapc.planning.costs import shipped
from asapc.planning.operators import build, exact_operator, lower, operators, softmax_operator
from asapc.planning.propose import enough, split
from asapc.planning.trials import Attention
from asapc.types.choices import Candidate, Selection
from asapc.types.site import Site
from asapc.types.teacher import Teacher
from benchmarks.fits import fitted_slices, random_directions
from benchmarks.one_pass import fits, modules_of

BATCH = 4  # for which operators are chosen, lowered and timed, alone and in whole models
SLICES, TRUNCATIONS = (8, 32, 64), (2, 4, 8, 16)  # truncations in half-steps
WRITTEN, EXACT, ONE_PASS, DEFAULT, SOFTMAX = "as written", "exact", "one pass", "default", "softmax"
Modules = dict[str, nn.Module]


class OfPoints(nn.Module):
    """A kernel of `asapc.models`, which computes its own scores, called as an operator."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, scores: Tensor, queries: Tensor, keys: Tensor, values: Tensor | None = None) -> Tensor:
        """Return outputs (B, H, N, E), or without values the plan (B, H, N, M)."""
        if values is None:
            plan: Tensor = self.kernel.plan(queries, keys, None, None)
            return plan
        output: Tensor = self.kernel(queries, keys, values)
        return output


def planned(teacher: Teacher) -> Selection:
    """Choose operators as `asapc compile` does by default; what was fitted is kept for the next part of the study."""
    config = CompileConfig(batches=(BATCH,))
    return choose(teacher, config, shipped(), cache=cache_of(config))


def compiled(teacher: Teacher, selection: Selection) -> dict[str, Modules]:
    """Return one pass, from hinges and pairs, and a selection; a loop that it keeps is as written."""
    choosing, fitting = split(enough(teacher))
    one_pass = modules_of(teacher.sites, fits(teacher.graph, list(teacher.sites), fitting, choosing))
    return {ONE_PASS: lowered(teacher, one_pass), DEFAULT: written(teacher) | operators(teacher.sites, selection)}


def written(teacher: Teacher) -> Modules:
    """Return the loops as they are written: in the log domain, columns first."""
    return {
        site.name: OfPoints(Sinkhorn(1 / (scale(site) * width(site) ** 0.5), site.loop.half_steps // 2, form="log"))
        for site in teacher.sites
    }


def rivals(teacher: Teacher, selection: Selection, truncations: Sequence[int]) -> dict[str, Modules]:
    """Return softmax, the exact form, and truncations that are shorter than the loops."""
    sites, shortest = teacher.sites, min(site.loop.half_steps for site in teacher.sites)
    forms: dict[str, Modules] = {SOFTMAX: {site.name: softmax_operator(site) for site in sites}}
    for steps in (*(t for t in truncations if t < shortest), None):
        name = EXACT if steps is None else f"truncated {steps}"
        forms[name] = {site.name: exact_operator(site, steps, site.name in selection.wide) for site in sites}
    return {name: lowered(teacher, modules) for name, modules in forms.items()}


def sorted_slices(teacher: Teacher, selection: Selection, count: int) -> Modules:
    """Return ASAP's operator as its abstract describes it: the queries' dual from random slices, closed once."""
    choosing, fitting = split(enough(teacher))
    torch.manual_seed(0)
    modules: Modules = {}
    for site in teacher.sites:
        directions = random_directions(site, count)
        params = fitted_slices(teacher.graph, site, directions, count, fitting, choosing, "queries")
        candidate = Candidate("sliced_dual", 2, 0.0, None, to_dtype(params, site.wiring.dtype))
        modules[site.name] = build(site, candidate, selection.wide)
    return lowered(teacher, modules)


def sliced_transport(teacher: Teacher, count: int) -> Modules:
    """Return sliced transport with soft sorting, which computes another plan than the loop."""
    return {site.name: OfPoints(SlicedTransport(count)) for site in teacher.sites}


def lowered(teacher: Teacher, modules: Modules) -> Modules:
    """Return operators, each in its cheaper form."""
    return {site.name: lower(site, modules[site.name], BATCH, shipped()) for site in teacher.sites}


def layer(site: Site, module: nn.Module) -> nn.Module:
    """Return what stands at a site as a layer of its own, from queries, keys and values to outputs."""
    return module.kernel if isinstance(module, OfPoints) else Attention(module, scale(site))


def scale(site: Site) -> float:
    """Return the factor from q.k to scores, which all heads of a teacher of the study share."""
    return float(site.wiring.product.score_scale.mean())


def width(site: Site) -> int:
    """Return the head size."""
    return site.wiring.product.head_dim
