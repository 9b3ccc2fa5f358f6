"""Conditions on a region whose numbers are those of a loop on the samples: it has to be one on all inputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from asapc.passes.find.candidates import PlanCandidate
from asapc.passes.find.explain import Explanation, foreign_inputs, name_of
from asapc.passes.find.kinds import is_constant
from asapc.passes.find.probe import PLAN_TOLERANCE, NotSinkhorn, difference
from asapc.passes.find.regions import Region
from asapc.types.site import Loop

UNEXPLAINED = 5  # how near to a loop a region is that fails one of these conditions


def require_steps(explanation: Explanation) -> None:
    """Raise NotSinkhorn if a node of the region does not belong to a loop: it may act on other samples."""
    if explanation.unexplained is not None:
        raise NotSinkhorn(
            f"{name_of(explanation.unexplained)} is not part of a Sinkhorn loop: even if it has no effect on the "
            "samples, it may have on others",
            "leave it out, or apply it to the scores before the loop",
            nearness=UNEXPLAINED,
        )


def require_guard(loop: Loop, explanation: Explanation, error: float) -> None:
    """Raise NotSinkhorn if constants in divisors change the plan on the samples, and no guard explains how."""
    if loop.guard is None and error > PLAN_TOLERANCE:
        raise NotSinkhorn(
            f"{name_of(next(iter(explanation.ideal)))} changes the plan by {error:.1e}, and not as one constant in "
            "all sums of rows, and one in all of columns, would",
            "add one constant to all sums of rows and one to all of columns, or smaller ones",
            nearness=UNEXPLAINED,
        )


def require_own(region: Region, value: Tensor, plan: Tensor) -> None:
    """Raise NotSinkhorn if the plan depends on more that changes with the model's inputs than scores and masks.

    Terms of rows or columns that the loop takes off again may be read: others give the same plan.
    """
    for node in foreign_inputs(region):
        if difference(region(value, inputs={node: unlike(region.inputs[node])}), plan) > PLAN_TOLERANCE:
            raise NotSinkhorn(
                f"the loop reads {name_of(node)}, which changes with the model's inputs and is neither its scores nor "
                "a mask",
                "scale or shift the scores by it before the loop",
                nearness=UNEXPLAINED,
            )


def require_evidence(candidate: PlanCandidate, values: Mapping[Node, Any]) -> None:
    """Raise NotSinkhorn if the loop reads an input, such as a mask, that is constant on the samples.

    Its effect does not show then, and a rewrite could leave it out.
    """
    constant = [n for n in sorted(candidate.side_inputs) if is_same_in_all(n, values.get(n)) and not is_constant(n)]
    if constant:
        raise NotSinkhorn(
            f"the loop reads {constant[0].name}, which depends on the model's inputs but is constant on the samples, "
            "so its effect cannot be determined",
            "use samples on which it varies: for a mask, some with padding",
            nearness=4,
            untold=tuple(node.name for node in constant),
        )


def require_uniform(region: Region, loop: Loop) -> None:
    """Raise NotSinkhorn if masses differ by row or column and may depend on the model's inputs."""
    varying = [node for node in sorted(region.inputs) if not is_constant(node)]
    if varying and not loop.uniform:
        raise NotSinkhorn(
            f"the masses of rows or columns may depend on {name_of(varying[0])}, which changes with the model's inputs",
            "take masses from parameters alone",
            nearness=UNEXPLAINED,
        )


def unlike(value: Tensor) -> Tensor:
    """Return a tensor of the same shape with other values of about the same size."""
    if not value.is_floating_point():
        return ~value if value.dtype == torch.bool else value + 1
    size = value.abs().nan_to_num(posinf=0.0).mean()
    ramp = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).reshape(value.shape)
    return -2 * value.flip(list(range(value.dim()))) + (1 + size) * ramp


def is_same_in_all(node: Node, value: Any) -> bool:
    """Return whether a node's value is a tensor that is the same for all samples."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 1:
        return False
    open_axes = [axis for axis, size in enumerate(node.meta["val"].shape) if not isinstance(size, int)]
    axis = open_axes[0] if open_axes else 0
    return bool((value == value.narrow(axis, 0, 1)).all())
