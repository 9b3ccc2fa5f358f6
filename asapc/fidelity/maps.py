"""What a site's attention looks like on a few samples: the teacher's plan beside its operator's, for figures."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asapc.fidelity.sites import Reference, widen
from asapc.types.site import Site

MAX_SIZE = 64  # queries, and keys, that a map shows
MAX_COLUMNS = 128


@dataclass(frozen=True, eq=False)
class Maps:
    """The plans of one head on S samples: n of the queries and m of the keys, evenly spaced where there are more.

    Attributes:
        head: the one in which the two differ most on these samples.
        teacher, compiled: (S, n, m) entries of the plans, of which 1 is what each would be if all were the same.
        columns: (2, S, k) column sums of the two over what they are held to, of k of the keys; NaN where masked.
    """

    head: int
    teacher: Tensor
    compiled: Tensor
    columns: Tensor


def site_maps(site: Site, operator: nn.Module | None, values: Mapping[str, Tensor], samples: int) -> Maps:
    """Compare the plans of a site.

    Args:
        site: the site.
        operator: what replaces it; None where the loop is kept.
        values: of its operands and of its plan, by the node's name, on the samples.
        samples: how many those are.
    """
    loop = Reference.of(site, values)
    compiled = loop.plan
    if operator is not None:
        with torch.no_grad():
            compiled = widen(operator(*loop.inputs[:3]))
        compiled = compiled.exp() if site.wiring.logarithm else compiled
    # Of a sample that attends in windows, which stand side by side, the first.
    each = torch.arange(samples) * (len(loop.plan) // samples)
    teacher, compiled = loop.plan[each], compiled[each]
    head = int((teacher - compiled).abs().sum(dim=(0, 2, 3)).argmax())
    uniform = loop.row_mass[each, head].amax() / site.loop.keys
    rows, keys = (spaced(size, MAX_SIZE) for size in teacher.shape[-2:])
    one, other = ((plan[:, head][:, rows][..., keys] / uniform).float() for plan in (teacher, compiled))
    columns = spaced(teacher.shape[-1], MAX_COLUMNS)
    expected = loop.column_mass[each, head].expand(-1, 1, teacher.shape[-1])
    sums = torch.stack([plan[:, head].double().sum(dim=-2) / expected.squeeze(-2) for plan in (teacher, compiled)])
    live = loop.columns.expand(len(loop.plan), site.loop.heads, -1, -1)[each, head].squeeze(-2)
    return Maps(head, one, other, torch.where(live, sums, torch.nan)[..., columns].float())


def spaced(count: int, most: int) -> Tensor:
    """Return which of so many are shown: all, or as many as that, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()
