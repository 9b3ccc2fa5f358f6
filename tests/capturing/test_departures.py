"""What leaves the graph as an array is dropped; what would come back is refused."""

import io

import numpy as np
import pytest
import torch
from helpers.stopping import ROUNDING, captured, output, scores
from helpers.tolerances import difference
from torch import nn

from asapc.errors import CaptureError


class Watched(nn.Module):
    """A layer that hands its plan to somebody on the way."""

    def __init__(self, watch):
        super().__init__()
        self.watch, self.seen, self.count = watch, [], 0
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        plan = x.softmax(-1)
        returned = self.watch(self, plan)
        return plan @ x if returned is None else plan @ x * returned


def edit(module, plan):
    copy = plan.detach().numpy().copy()
    copy[0], copy[..., 1] = 0, copy[..., 0]
    copy *= 2
    np.fill_diagonal(copy[-1], 0)
    module.seen.append(copy)


def count(module, plan):
    module.count += 1
    module.seen.append(plan.sum().item())


KEPT = {
    "kept": lambda m, plan: m.seen.append(plan.detach().cpu().numpy()),
    "kept as an attribute": lambda m, plan: setattr(m, "map", plan.detach().numpy()),
    "asarray": lambda m, plan: m.seen.append(np.asarray(plan.detach())),
    "computed with": lambda m, plan: m.seen.append(np.mean(plan.detach().numpy(), axis=0) + 1),
    "saved": lambda m, plan: np.save(io.BytesIO(), plan.detach().numpy()),
    "printed": lambda m, plan: m.seen.append(f"{plan.detach().numpy()} {plan.mean():.3f}"),
    "tensor printed": lambda m, plan: m.seen.append(str(plan)),
    "copied and changed": edit,
    "counted": count,
    "formatted": lambda m, plan: m.seen.append(f"{np.sqrt(plan.detach().numpy()).mean():.3f}"),
    "of a parameter": lambda m, plan: float(m.scale.detach().numpy()[0]),
}
REFUSED = {
    "from_numpy": lambda m, plan: torch.from_numpy(plan.detach().numpy().astype(np.float32)).sum(),
    "tensor": lambda m, plan: torch.tensor(plan.detach().numpy()).sum(),
    "as_tensor": lambda m, plan: torch.as_tensor(np.sqrt(plan.detach().numpy())).sum(),
    "branch": lambda m, plan: 2.0 if plan.detach().numpy().max() > 0.5 else 1.0,
    "mean and branch": lambda m, plan: 2.0 if np.mean(plan.detach().numpy()) > 0.5 else 1.0,
    "number": lambda m, plan: float(plan.detach().numpy().std()),
    "item": lambda m, plan: plan.detach().numpy().max().item(),
    "index": lambda m, plan: [1.0, 2.0, 3.0, 4.0, 5.0][plan[0, 0].detach().numpy().argmax()],
    "function": lambda m, plan: [1.0, 2.0, 3.0, 4.0, 5.0][np.argmax(plan[0, 0].detach().numpy())],
    "rounded": lambda m, plan: float(int(np.round(plan.detach().numpy().sum()))),
    "any": lambda m, plan: 2.0 if (plan.detach().numpy() > 0.9).any() else 1.0,
    "allclose": lambda m, plan: 2.0 if np.allclose(plan.detach().numpy(), 0) else 1.0,
    "written to": lambda m, plan: plan.detach().numpy().__imul__(2) is None,
    "entry written to": lambda m, plan: plan.detach().numpy().__setitem__(0, 0),
    "diagonal written to": lambda m, plan: np.fill_diagonal(plan[0].detach().numpy(), 0),
    "copied to": lambda m, plan: np.copyto(plan.detach().numpy(), 0),
    "view written to": lambda m, plan: plan.detach().numpy().T.__setitem__(0, 0),
    "mask": lambda m, plan: torch.from_numpy(plan.detach().numpy() > 0.5),
    "places": lambda m, plan: torch.from_numpy(np.argsort(plan.detach().numpy())).sum(),
    "search": lambda m, plan: float(np.searchsorted(np.arange(3.0), plan.detach().numpy()[0, 0, 0])),
    "entry": lambda m, plan: 2.0 if plan.detach().numpy()[0, 0, 0] > 0.5 else 1.0,
    "plain array": lambda m, plan: 2.0 if np.array(plan.detach().numpy(), dtype=float).max() > 0.5 else 1.0,
    "largest": lambda m, plan: 2.0 if np.asarray(plan.detach().numpy()).max() > 0.5 else 1.0,
    "flat": lambda m, plan: 2.0 if next(plan.detach().numpy().flat) == 0 else 1.0,
    "iterated": lambda m, plan: sum(1.0 for row in plan.detach().numpy() if row[0, 0] > 0.5),
    "numbers": lambda m, plan: plan.detach().numpy().astype(np.float32).sum(),
    "list": lambda m, plan: plan.detach().numpy().sum((1, 2)).tolist()[0],
    "out": lambda m, plan: np.multiply(a := plan.detach().numpy(), 2, out=a) is None,
}


@pytest.mark.parametrize("name", KEPT)
def test_what_does_not_come_back_changes_nothing(name):
    graph = captured(Watched(KEPT[name]), scores(4), early_stop="refuse")
    fresh = Watched(KEPT[name])
    samples = scores(7)
    assert difference(output(graph.program.module(), samples), output(fresh, samples)) < ROUNDING


def test_it_is_said_where_something_leaves():
    [source] = captured(Watched(KEPT["kept"]), scores(4)).departures
    assert source.startswith(f"{__file__}:")
    assert captured(Watched(lambda m, plan: None), scores(4)).departures == ()


@pytest.mark.parametrize("name", REFUSED)
def test_what_comes_back_is_refused_with_its_line(name):
    with pytest.raises(CaptureError) as caught:
        captured(Watched(REFUSED[name]), scores(4))
    assert __file__ in str(caught.value)
    assert caught.value.hint
