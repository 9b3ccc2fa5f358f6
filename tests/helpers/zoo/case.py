"""What is known about a model of the zoo."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Axis = Literal["rows", "columns"]


@dataclass(frozen=True)
class Expected:
    """A Sinkhorn loop. Rows are what the output of `plan @ v` is indexed by; without one, axis -2 of the plan."""

    half_steps: int  # normalisations of a single axis, a softmax at either end among them; at most, with an early stop
    last: Axis
    epsilon: float | tuple[float, ...] | None  # scores = q.k / (sqrt(head_dim) * epsilon); None: scores are no q.k
    kind: Literal["attention", "plan"] = "attention"  # "plan": the plan does not meet values in a product
    masked: bool = False


@dataclass(frozen=True)
class Case:
    """A model, inputs for it, and what is to be found in it. Seed before `build`."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], dict[str, Tensor]]  # (batch, generator); every first axis is the batch
    sites: tuple[Expected, ...] = ()  # in the order in which the forward comes to them
    reason: str = ""  # of a negative: what should be said about it
    early_stop: bool = False  # branches on values of tensors
    # The output, written down a second time from the definition: (model, sites, **inputs), of positives.
    reference: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    tolerance: float = 1e-9  # to the reference, relative, in float64; more where a model adds constants to its sums
