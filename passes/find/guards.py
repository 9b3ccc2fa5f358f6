"""Finds out how the constants of a loop keep its divisors from zero, so that the exact form can do the same.

The loop runs on scores so sharp that its constants act. The guard is the one, of all ways in which code writes one such
constant or one for rows and one for columns, with which the reference loop gives the same plans.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from itertools import permutations, product
from math import inf
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from asapc.ops.guarded import SUMMED, guarded_plan_ref
from asapc.passes.find.probe import difference
from asapc.types.site import Floor, Guard, Loop

# Multiples of the samples' scores on which a loop is compared with itself less its constants, and from which relative
# difference on they count.
REACHES, REACH_TOLERANCE = (1.0, 3.0, 10.0, 30.0, 100.0), 1e-4
SHIFTS = (-30.0, -10.0, 10.0, 30.0)  # of scores, in units of the temperature
TOLERANCE = 1e-9  # relative, of plans in float64
MAX_EXPONENT = 700.0  # of which float64 has the exponential
SOME = slice(0, 2)  # of samples and of heads, on which all guards are tried first


def find_guard(
    loop: Loop,
    scores: Tensor,
    floors: Collection[Floor],
    respond: Callable[[Tensor], Tensor],
    ideal: Callable[[Tensor], Tensor],
) -> tuple[Guard | None, float]:
    """Return the guard of a loop, and its reach without one; no guard where no constant acts, or none fits.

    Args:
        loop: the loop less its constants.
        scores: (B, H, N, M) as the scores node has them, float64.
        floors: the constants in its divisors.
        respond: returns the plan that the model's loop makes of such scores.
        ideal: returns the plan without constants.
    """
    tried, reach = list[tuple[Tensor, Tensor]](), inf
    for factor, before in zip(REACHES, (0.0, *REACHES), strict=False):
        plan = respond(factor * scores)
        if not bool(torch.isfinite(plan).all()):
            reach = min(reach, before)
            break  # the model's own arithmetic overflows
        tried.append((factor * scores * loop.scale[:, None, None], plan))
        if difference(plan, ideal(factor * scores)) > REACH_TOLERANCE:
            reach = min(reach, before)
    if reach == inf or not 0 < len(floors) <= len(SUMMED):
        return None, reach
    # On scores like the samples' a constant may not act in the first half-steps; with other sums of rows and columns it
    # does, so that all places where it may stand can be told apart.
    for shift in shifts(scores):
        shifted = scores + shift / loop.scale[:, None, None]
        plan = respond(shifted)
        if bool(torch.isfinite(plan).all()):
            tried.append((shifted * loop.scale[:, None, None], plan))
    # Code that takes the exponential of scores as they are may give finite plans of overflows: zeros.
    sound = [(sharper, plan) for sharper, plan in tried if sharper.amax() < MAX_EXPONENT]
    acts = any(
        difference(plan, ideal(sharper / loop.scale[:, None, None])) > REACH_TOLERANCE for sharper, plan in sound
    )
    fitting = (
        guard
        for plans in ((tried, sound) if acts else (tried,))
        for guard in readings(floors)
        if fits(guard, loop, plans, SOME) and fits(guard, loop, plans)
    )
    return next(fitting, None), reach


def shifts(scores: Tensor) -> Iterator[Tensor]:
    """Yield terms of rows and columns, in units of the temperature."""
    generator = torch.Generator().manual_seed(0)
    for size in SHIFTS:
        rows, columns = (torch.randn(n, generator=generator, dtype=scores.dtype) for n in scores.shape[-2:])
        yield size * (1 + (rows[:, None] + columns) / 2)


def readings(floors: Collection[Floor]) -> Iterator[Guard]:
    """Yield every guard with this constant, or with these two."""
    hints, first, *more = get_type_hints(Guard), *floors
    sides = permutations((first, *more)) if more else ((first, first), (first, None), (None, first))
    for rows, columns in sides:
        for reading in product(*(get_args(hints[field.name]) for field in fields(Guard)[2:])):
            yield Guard(rows, columns, *reading)


def fits(guard: Guard, loop: Loop, tried: Collection[tuple[Tensor, Tensor]], some: slice = slice(None)) -> bool:
    """Return whether a loop with a guard gives these plans, of scores in units of the temperature, for some samples."""
    masses = (loop.row_mass, loop.column_mass)
    return all(
        difference(guarded_plan_ref(scores[some, some], loop.half_steps, loop.last, guard, *masses), plan[some, some])
        < TOLERANCE
        for scores, plan in reversed(tuple(tried))  # what comes last tells most readings apart
    )
