"""Gathers what the figures of a report show, from a few held-out samples."""

from collections.abc import Mapping

import numpy as np
from torch import nn

from asapc.fidelity.maps import site_maps
from asapc.fidelity.outputs import BATCH
from asapc.passes.record import record
from asapc.planning.duals import true_and_predicted
from asapc.types.choices import Selection, SlicedDualParams
from asapc.types.teacher import Teacher

SAMPLES = 2


def gather_figures(teacher: Teacher, selection: Selection, operators: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
    """Return the arrays that `writing.html` draws: by the number of the site, see `fidelity.maps.Maps`.

    Args:
        teacher: the model.
        selection: its operators.
        operators: their modules, by the site's name; sites that are kept have none.
    """
    graph, arrays = teacher.graph, dict[str, np.ndarray]()
    samples = teacher.held_out[: min(SAMPLES, graph.samples_at_once(BATCH))]
    sites = teacher.sites
    names = {operand.node for site in sites for operand in (*site.wiring.operands, site.wiring.plan)}
    values = record(graph.program.module(), samples, names)
    for number, site in enumerate(sites):
        maps = site_maps(site, operators.get(site.name), values, len(samples))
        arrays[f"{number}.head"] = np.array(maps.head)
        arrays[f"{number}.teacher"] = maps.teacher.half().numpy()
        arrays[f"{number}.compiled"] = maps.compiled.half().numpy()
        arrays[f"{number}.columns"] = maps.columns.numpy()
        params = selection.choices[site.name].candidate.params
        if isinstance(params, SlicedDualParams):
            arrays[f"{number}.dual"] = true_and_predicted(site, params, values, maps.head).numpy()
    return arrays
