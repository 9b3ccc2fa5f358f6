"""Reads the operator of a site that a report and the parameters beside it describe."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from torch import Tensor

from asapc.loading.manifest import COMPILE
from asapc.loading.untrusted.source import Source
from asapc.types.choices import AMORTISED_LAYERS, AmortisedParams, Candidate, SlicedDualParams
from asapc.types.site import Site


def read_choice(source: Source, site: Site, report: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Candidate:
    """Return the operator that a report and the parameters beside it, those of `source`, describe.

    Raises:
        CheckpointError: it has more half-steps than the site, or lacks parameters.
    """
    choice = report["choice"]
    if choice["half_steps"] > site.loop.half_steps:
        raise source.refuse(f"{site.name} has fewer half-steps than the operator that replaced it", COMPILE)
    params: SlicedDualParams | AmortisedParams | None = None
    if choice["operator"] == "sliced_dual":
        maps = max(1, choice["half_steps"] // 2)
        parts = ["query_basis", "key_basis", "knots", *(f"weights.{i}" for i in range(maps))]
        query_basis, key_basis, knots, *weights = parts_of(source, site, tensors, parts)
        params = SlicedDualParams(
            query_basis,
            key_basis,
            slices=choice["slices"],
            knots=knots,
            weights=tuple(weights),
            side=choice["side"] or "keys",
            paired="pairs" in choice["features"],
            one_pass=choice["half_steps"] == 1,
        )
        if query_basis.shape != key_basis.shape or params.slices > query_basis.shape[-1]:
            raise source.refuse(f"its bases do not fit {site.name}", COMPILE)
    if choice["operator"] == "amortised":
        of_kinds = ([f"{kind}.{i}" for i in range(AMORTISED_LAYERS)] for kind in AmortisedParams._fields)
        params = AmortisedParams(*(tuple(parts_of(source, site, tensors, parts)) for parts in of_kinds))
        loop = site.loop
        ends = loop.queries * loop.keys, loop.keys if loop.last == "rows" else loop.queries
        if params.ends != ends:
            raise source.refuse(f"its network does not fit {site.name}", COMPILE)
    return Candidate(choice["operator"], choice["half_steps"], inf, None, params, choice["lowering"])


def parts_of(source: Source, site: Site, tensors: Mapping[str, Tensor], parts: Sequence[str]) -> list[Tensor]:
    """Return parameters of a site, by the names of their parts.

    Raises:
        CheckpointError: one is missing.
    """
    for part in parts:
        if f"{site.name}.{part}" not in tensors:
            raise source.refuse(f"it lacks {part} of {site.name}", COMPILE)
    return [tensors[f"{site.name}.{part}"] for part in parts]
