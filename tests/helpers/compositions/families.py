"""Families of near-misses: loops that equal Sinkhorn's on mild scores, or almost do, and differ on others.

A family maps a `Poisoned` and its scores to a plan. What it limits it limits at the composition's `limit`, of scores,
or at the exponential of that, of kernels and vectors; what it adds is the composition's `constant`. Some are Sinkhorn
loops all the same, of other scores or before another step: these may be replaced, if what is around them stays.
"""

import math

import torch
import torch.nn.functional as F

MASKED = -1e9


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


def below(values, limit):
    """A soft maximum of `limit`."""
    return limit - F.softplus(limit - values)


# One function, and its limits from both sides or one.
LIMITS = {
    "clamp": lambda t, low, high: t.clamp(low, high),
    "floor": lambda t, low, high: t.clamp_min(low),
    "cap": lambda t, low, high: t.clamp(max=high),
    "minimum": lambda t, low, high: torch.minimum(t, tensor(high).to(t)),
    "maximum": lambda t, low, high: torch.maximum(t, tensor(low).to(t)),
    "where": lambda t, low, high: torch.where(t > high, high, t),
    "nan_to_num": lambda t, low, high: t.nan_to_num(nan=0.0, posinf=high, neginf=low),
}
# The same by steps that a loop is made of.
DISGUISED = {
    "where_of_a_difference": lambda t, low, high: torch.where(t - high > 0, high, t),
    "absolute_difference": lambda t, low, high: (t + high - (t - high).abs()) / 2,
    "root_of_a_square": lambda t, low, high: (t + high - (t - high).square().sqrt()) / 2,
    "smallest_of_a_stack": lambda t, low, high: torch.stack([t, torch.full_like(t, high)]).amin(0),
    "logaddexp": lambda t, low, high: -torch.logaddexp(-t, torch.full_like(t, -high)),
    "gate_by_softmax": lambda t, low, high: t * torch.stack([torch.full_like(t, high), t]).softmax(0)[0],
}
SOFT = {
    "tanh": lambda t, low, high: high * torch.tanh(t / high),
    "softplus": lambda t, low, high: below(t, high),
    "hardtanh": lambda t, low, high: F.hardtanh(t, low, high),
    "asinh": lambda t, low, high: high * torch.asinh(t / high),
    "huber": lambda t, low, high: -F.smooth_l1_loss(t, torch.zeros_like(t), reduction="none", beta=high),
}


def of_scores(limit):
    return lambda p, s: p.loop(limit(s, -p.limit, p.limit))


def of_kernel(limit):
    return lambda p, s: p.of_kernel(limit(s.exp(), math.exp(-p.limit), math.exp(p.limit)))


def of_potentials(limit):
    return lambda p, s: p.dual_plan(s, lambda total, dim: limit(total, -p.limit, p.limit))


def of_vectors(limit):
    return lambda p, s: p.vector_plan(s, lambda u: limit(u, math.exp(-p.limit), math.exp(p.limit)))


def of_steps(limit):
    """In the log domain, after each half-step."""
    return lambda p, s: p.log_plan(s, after=lambda i, plan: limit(plan, -p.limit, p.limit))


def by_count(count):
    """A power of each sum that is the number of samples, in one way or another."""
    return lambda p, s: p.log_plan(s, total=lambda i, plan: plan.logsumexp(p.dims[i], keepdim=True) * count(p.x) / 2)


def later_samples_otherwise(p, s):
    """Damping from the third sample of a batch on: the finder sees two."""
    place = torch.arange(p.x.shape[0])[:, None, None, None].expand(-1, p.c.heads, 1, 1)
    damping = p.model.laid_out(torch.where(place > 1, 0.9, 1.0), p.x.shape[0])
    return p.log_plan(s, total=lambda i, plan: damping * plan.logsumexp(p.dims[i], keepdim=True))


def of_plan(change):
    return lambda p, s: change(p, p.loop(s))


def guard(keep):
    """Divisors that a constant keeps from zero."""
    return lambda p, s: p.of_kernel(s.exp(), lambda total: keep(total, p.constant))


def by_scores(p, s):
    """The largest score of each sample and head."""
    return s.amax((p.rows, p.columns), keepdim=True)


def largest(p, plan, left_out=1):
    return plan >= plan.topk(plan.shape[p.rows] - left_out, dim=p.rows).values.amin(p.rows, keepdim=True)


def temperature_by_head(p, s):
    """The same for all samples of a batch, from all of them."""
    others = [axis for axis in range(s.dim()) if p.axes[axis] != "h"]
    return p.loop(s / s.abs().mean(others, keepdim=True))


def part_of_a_sum(p, s):
    """Each half-step leaves the last entry out of its sums."""
    for dim in p.dims:
        s = s - s.narrow(dim, 0, s.shape[dim] - 1).logsumexp(dim, keepdim=True)
    return s.exp()


def mask_in_one_step(p, s, step=0):
    """The first half-step, whose mark the others may take off, or the last but one."""
    return p.log_plan(s, before=lambda i, plan: torch.where(p.padding(), MASKED, plan) if i == step else plan)


def masks_that_differ(p, s):
    """Queries are left out of half-steps on columns, and others of half-steps on rows."""

    def before(i, plan):
        return torch.where(p.padding(late=p.dims[i] == p.columns), MASKED, plan)

    return p.log_plan(s, before=before)


def nearly_a_mask(p, s):
    """Zeros and ones of a steep sigmoid."""
    return p.of_kernel(s.exp() * torch.sigmoid(40 * (p.by_query() + 1.5)))


def noise_before(p, s):
    """A dropout of the kernel that is always the same: a bias."""
    return p.of_kernel(s.exp() * torch.where(p.noise() > -0.5, 1.25, 0.25))


def noise_in_the_middle(p, s):
    kept = torch.where(p.noise() > -0.5, 1.25, 0.25).log()
    return p.log_plan(s, after=lambda i, plan: plan + kept if i == len(p.dims) // 2 else plan)


def scores_return(p, s):
    """A little of the scores comes back at each half-step."""
    return p.log_plan(s, after=lambda i, plan: plan + p.constant * s)


def other_scores_last(p, s):
    """The potentials of a loop, on the scores of the neighbouring query."""
    f, g = p.dual_loop(s, p.dims, p.lse)
    return (s.roll(1, p.columns) + f + g).exp()


def scores_turn_soft(p, s):
    """The potentials of a loop, on scores that have a cap."""
    f, g = p.dual_loop(s, p.dims, p.lse)
    return (p.limit * torch.tanh(s / p.limit) + f + g).exp()


def changing_marginals(p, s):
    """Each half-step has masses of its own."""
    size = s.shape[p.columns]
    ramps = [torch.linspace(-1, 1, size).roll(i).view([-1 if a == "n" else 1 for a in p.axes]) for i in range(3)]
    return p.log_plan(s, after=lambda i, plan: plan + ramps[i % 3] if p.dims[i] == p.rows else plan)


def marginals_of_the_batch(p, s):
    mass = p.x.mean((0, 2)).softmax(-1).log()
    mass = p.model.laid_out(mass[None, None, :, None], p.x.shape[0])
    return p.log_plan(s, after=lambda i, plan: plan + mass if p.dims[i] == p.rows else plan)


def marginals_by_tokens(p, s):
    mass = p.by_query().tanh()
    return p.log_plan(s, after=lambda i, plan: plan + mass if p.dims[i] == p.rows else plan)


def other_powers(p, s):
    """The norm of a power close to 1 instead of the sum."""
    q = 1 + p.constant
    return p.log_plan(s, total=lambda i, plan: (q * plan).logsumexp(p.dims[i], keepdim=True) / q)


def half_a_step(p, s):
    """One half-step in the middle goes only half of the way."""
    middle = len(p.dims) // 2 - 1
    return p.log_plan(s, total=lambda i, plan: plan.logsumexp(p.dims[i], keepdim=True) / (2 if i == middle else 1))


def axis_twice(p, s):
    """Harmless: the second time changes nothing."""
    for dim in p.dims:
        s = s.log_softmax(dim).log_softmax(dim)
    return s.exp()


def both_at_once(p, s):
    """Both potentials are updated from the old ones."""
    f, g = torch.zeros_like(s.narrow(p.rows, 0, 1)), torch.zeros_like(s.narrow(p.columns, 0, 1))
    for _ in range(len(p.dims)):
        f, g = -p.lse(s + g, p.rows), -p.lse(s + f, p.columns)
    return (s + f + g).exp()


def momentum(p, s):
    f, g, before = torch.zeros_like(s.narrow(p.rows, 0, 1)), torch.zeros_like(s.narrow(p.columns, 0, 1)), 0.0
    for _ in range(len(p.dims) // 2):
        g = -p.lse(s + f, p.columns)
        f, before = -p.lse(s + g, p.rows) + p.constant * (f - before), f
    return (s + f + g).exp()


def cumulative(p, s):
    plan = s.exp()
    for dim in p.dims:
        plan = plan / plan.cumsum(dim)
    return plan


def series(p, s):
    """An exponential by a power."""
    return p.of_kernel((1 + s / 2**20).clamp_min(0) ** 2**20)


def frozen(p, s, steps=8, tolerance=1e-3):
    """Samples that have converged stay as they are."""
    plan = s
    for _ in range(steps):
        after = plan.log_softmax(p.columns).log_softmax(p.rows)
        done = (after - plan).abs().amax((p.rows, p.columns), keepdim=True) < tolerance
        plan = torch.where(done, plan, after)
    return plan.exp()


def relaxed_first(p, s, steps=8, first=3):
    """Over-relaxation that ends early."""
    f, g = torch.zeros_like(s.narrow(p.rows, 0, 1)), torch.zeros_like(s.narrow(p.columns, 0, 1))
    for i in range(steps):
        omega = 1.5 if i < first else 1.0
        g = (1 - omega) * g - omega * p.lse(s + f, p.columns)
        f = (1 - omega) * f - omega * p.lse(s + g, p.rows)
    return (s + f + g).exp()


def annealed_first(p, s, steps=8, fall=0.5):
    """A temperature that falls to its end early."""
    f, g = torch.zeros_like(s.narrow(p.rows, 0, 1)), torch.zeros_like(s.narrow(p.columns, 0, 1))
    for i in range(steps):
        eps = max(1.0, 4.0 * fall**i)
        g = -eps * p.lse((s + f) / eps, p.columns)
        f = -eps * p.lse((s + g) / eps, p.rows)
    return (s + f + g).exp()


def steps_by_head(p, s):
    """The heads take different numbers of half-steps."""
    if "h" not in p.axes:
        return p.loop(s)
    axis = p.axes.index("h")
    heads = [s.narrow(axis, i, 1) for i in range(s.shape[axis])]
    return torch.cat([p.plain(head, p.dims + p.dims[-2:] * i) for i, head in enumerate(heads)], axis)


def steps_by_scores(p, s):
    """One iteration more for samples of large scores."""
    after = p.plain(s, p.dims)
    more = p.plain(s, p.dims + p.dims[-2:])
    return torch.where(by_scores(p, s) > p.limit, more, after)


def long(p, s, change):
    """At least 101 full iterations."""
    return change(p, s, steps=101 + p.c.seed)


FAMILIES = {
    # Of the scores.
    **{f"{name}_of_scores": of_scores(limit) for name, limit in (LIMITS | SOFT).items()},
    "masked_below_a_limit": lambda p, s: p.loop(torch.where(s < -p.limit, MASKED, s)),
    "clamp_of_differences": lambda p, s: p.loop((s - by_scores(p, s)).clamp_min(-2 * p.limit)),
    "temperature_of_large_scores": lambda p, s: p.loop(s / (1 + F.relu(by_scores(p, s).abs() - p.limit))),
    "temperature_of_a_large_input": lambda p, s: p.loop(s / (1 + F.relu(p.x.abs().max() - p.limit))),
    "deviation_of_the_batch": lambda p, s: p.loop(s / s.std()),
    "largest_of_the_batch": lambda p, s: p.loop(s / p.x.abs().max()),
    "deviation_of_the_inputs": lambda p, s: p.annealed_by(s, p.x.std()),
    "largest_of_the_inputs_in_the_loop": lambda p, s: p.annealed_by(s, p.x.abs().max()),
    "temperature_by_head": temperature_by_head,
    "number_of_samples": lambda p, s: p.loop(s * (p.x.shape[0] / 2)),
    "number_of_samples_in_the_loop": lambda p, s: p.log_plan(
        s, after=lambda i, plan: plan * (p.x.shape[0] / 2) if i == 1 else plan
    ),
    "open_gate": lambda p, s: p.loop(s * torch.sigmoid(by_scores(p, s) + p.limit)),
    "shut_gate": lambda p, s: p.loop(s + F.relu(s - p.limit)),
    "shut_gate_in_the_loop": lambda p, s: p.log_plan(s, after=lambda i, plan: plan + F.relu(-plan - p.limit)),
    # Of the kernel.
    **{f"{name}_of_the_kernel": of_kernel(limit) for name, limit in LIMITS.items()},
    "threshold_of_the_kernel": lambda p, s: p.of_kernel(F.threshold(s.exp(), math.exp(-p.limit), 0.0)),
    "added_to_the_kernel": lambda p, s: p.of_kernel(s.exp() + math.exp(-p.limit)),
    "series": series,
    # Of what a loop keeps.
    **{f"{name}_of_vectors": of_vectors(limit) for name, limit in LIMITS.items()},
    "soft_cap_of_vectors": lambda p, s: p.vector_plan(s, lambda u: u / (1 + math.exp(-p.limit) * u)),
    **{
        f"{name}_of_potentials": of_potentials(limit)
        for name, limit in (LIMITS | DISGUISED | SOFT).items()
        if name != "huber"
    },
    **{f"{name}_of_steps": of_steps(limit) for name, limit in LIMITS.items() if name not in ("minimum", "maximum")},
    # Of divisors.
    "added_constant": guard(lambda total, constant: total + constant),
    "constant_from_below": guard(lambda total, constant: total.clamp_min(constant)),
    "maximum_with_a_constant": guard(lambda total, constant: torch.maximum(total, tensor(constant).to(total))),
    "constant_in_place_of_less": guard(lambda total, constant: torch.where(total < constant, constant, total)),
    "constant_from_both_sides": guard(lambda total, constant: total.clamp(constant, 1 / constant)),
    "constant_in_entries": lambda p, s: p.of_kernel(s.exp(), entries=lambda plan: plan + p.constant),
    "constant_in_a_logarithm": lambda p, s: p.log_plan(
        s, total=lambda i, plan: (plan.exp().sum(p.dims[i], keepdim=True) + p.constant).log()
    ),
    "constant_beside_a_logsumexp": lambda p, s: p.log_plan(
        s,
        total=lambda i, plan: torch.logaddexp(
            plan.logsumexp(p.dims[i], keepdim=True), tensor(math.log(p.constant)).to(plan)
        ),
    ),
    # Of the batch.
    "samples_by_sum": by_count(lambda x: torch.ones_like(x[:, 0, 0]).sum()),
    "samples_by_fill": by_count(lambda x: torch.full_like(x[0, 0, 0], x.shape[0])),
    "samples_by_scalar": by_count(lambda x: torch.scalar_tensor(x.shape[0])),
    "later_samples_otherwise": later_samples_otherwise,
    # Other loops.
    "weakest_damping": lambda p, s: p.damped(s, 1 - p.constant),
    "part_of_a_sum": part_of_a_sum,
    "mask_in_the_first_step": mask_in_one_step,
    "mask_in_a_middle_step": lambda p, s: mask_in_one_step(p, s, len(p.dims) // 2),
    "masks_that_differ": masks_that_differ,
    "nearly_a_mask": nearly_a_mask,
    "noise_before": noise_before,
    "noise_in_the_middle": noise_in_the_middle,
    "scores_return": scores_return,
    "other_scores_last": other_scores_last,
    "scores_turn_soft": scores_turn_soft,
    "changing_marginals": changing_marginals,
    "marginals_of_the_batch": marginals_of_the_batch,
    "marginals_by_tokens": marginals_by_tokens,
    "other_powers": other_powers,
    "half_a_step": half_a_step,
    "axis_twice": axis_twice,
    "both_at_once": both_at_once,
    "momentum": momentum,
    "cumulative": cumulative,
    "frozen": frozen,
    "relaxed_first": relaxed_first,
    "annealed_first": annealed_first,
    "steps_by_head": steps_by_head,
    "steps_by_scores": steps_by_scores,
    "long_frozen": lambda p, s: long(p, s, frozen),
    "long_relaxed": lambda p, s: long(p, s, relaxed_first),
    "long_annealed": lambda p, s: long(p, s, annealed_first),
    # Of the plan.
    "threshold_of_the_plan": of_plan(lambda p, plan: F.threshold(plan, math.exp(-p.limit), 0.0)),
    "renormalised_above_a_threshold": of_plan(
        lambda p, plan: F.normalize(torch.where(plan > math.exp(-p.limit), plan, 0.0), p=1, dim=p.rows)
    ),
    "clamp_of_the_plan": of_plan(lambda p, plan: plan.clamp(math.exp(-p.limit), 1.0)),
    "power_of_the_plan": of_plan(lambda p, plan: plan ** (1 + p.constant)),
    "all_but_one_of_the_plan": of_plan(lambda p, plan: plan * largest(p, plan)),
    "all_of_the_plan": of_plan(lambda p, plan: plan * largest(p, plan, 0)),
    "largest_of_the_plan": of_plan(lambda p, plan: plan / plan.amax((p.rows, p.columns), keepdim=True)),
    "mixed_with_uniform": of_plan(lambda p, plan: (1 - p.constant) * plan + p.constant / plan.shape[p.rows]),
    "straight_through": of_plan(lambda p, plan: plan + p.constant * (largest(p, plan, 1).to(plan) - plan)),
    "plan_by_number_of_samples": of_plan(lambda p, plan: plan * (p.x.shape[0] / 2)),
}
LONG = tuple(name for name in FAMILIES if name.startswith("long_"))
# In whatever style a composition is, they hold exponentials of scores.
ON_KERNELS = (
    *(name for name in FAMILIES if name.endswith(("_kernel", "_vectors")) or "constant" in name),
    *("series", "nearly_a_mask", "noise_before", "cumulative"),
)
