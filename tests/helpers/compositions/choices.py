"""What code around a Sinkhorn loop differs in; a `Composition` is one option of each choice."""

from dataclasses import dataclass, fields, replace

from .families import FAMILIES, LONG, ON_KERNELS

AXES = {"bhnm": "bhnm", "merged": "znm", "last": "bnmh", "inside": "bnhm", "first": "hbnm", "none": "bnm"}
HEAD_DIM = 4


@dataclass(frozen=True)
class Composition:
    """One model; see `CHOICES`."""

    style: str = "subtract"
    half_steps: int = 6
    last: str = "rows"
    epsilon: str = "float"
    fold: str = "scores"
    layout: str = "bhnm"
    bias: str = "none"
    mask: str = "none"
    padding_seen: bool = True  # whether the samples that the finder sees hold padding
    marginals: str = "none"
    cross: bool = False
    post: str = "plain"
    sharpness: float = 2.0
    heads: int = 2
    tokens: int = 8
    seed: int = 0
    poison: str = "none"
    limit: float = 10.0  # of scores, where a poison limits something
    constant: float = 1e-3  # that a poison adds

    @property
    def in_log_domain(self):
        """Whether no exponential of large scores is ever taken."""
        on_kernels = self.style not in IN_LOG_DOMAIN or self.style == "log_of_sum"
        return not on_kernels and self.poison not in ON_KERNELS

    def __str__(self):
        parts = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ", ".join(parts) or "all defaults"


CHOICES = {
    "style": (
        "subtract",  # scores - logsumexp
        "log_softmax",
        "divide",
        "divide_in_place",
        "vectors_sum",  # scaling vectors, sums of products
        "vectors_matmul",
        "vectors_einsum",
        "potentials",  # that take on what is missing
        "duals",
        "softmax_end",  # duals, and a softmax as the last half-step
        "softmax_of_log",
        "normalize",  # torch.nn.functional.normalize with p=1
        "log_of_sum",  # duals by exp, sum and log
        "by_hand",  # logsumexp by hand
        "means",  # instead of sums
        "sinkformer",
    ),
    "half_steps": (2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 16, 20, 21, 40),
    "last": ("rows", "columns"),
    "epsilon": ("float", "buffer", "log_per_head", "softplus", "inverse_per_head"),
    "fold": ("scores", "queries", "keys", "both", "cost", "weights"),
    "layout": tuple(AXES),
    "bias": ("none", "none", "relative", "slopes", "pairs"),
    "mask": ("none", "none", "infinite", "finite", "zeros"),
    "padding_seen": (True,),
    "marginals": ("none", "none", "none", "columns", "rows"),
    "cross": (False, True),
    "post": (
        "plain",
        "plain",
        "dropout",
        "times_n",
        "returned",
        "transposed",
        "gated",
        "two_products",
        "double_inside",
        "on_values",  # the vectors scale values and result: no plan is built
    ),
    "sharpness": (0.7, 2.0, 4.0),
    "heads": (2, 3),
    "tokens": (6, 8, 11, 14),
    "seed": tuple(range(50)),
}
POISONS = (
    "damping",
    "weak_damping",
    "over_relaxed",
    "annealing",
    "noise",
    "sharpening",
    "sigmoid",
    "relu",
    "squares",
    "causal",
    "same_axis",
    "one_wrong_axis",
    "simultaneous",
    "maximum",
    "euclidean",
    "threshold",
    "floor",
    "large_constant",
    "small_constant",
    "temperature_by_sample",
    "across_heads",
    "across_samples",
    "scores_again",
    "power",
    "last_temperature",
    "averaged_plans",
    "one_marginal",
    "marginals_by_sample",
    "top_k",
    *FAMILIES,
)
# Mild and sharp scores, from samples on which it acts to scores that these never have.
LIMITS = (3.0, 8.0, 20.0, 60.0, 200.0)
CONSTANTS = (1e-12, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2)
LONG_LOOPS = (202, 401, 1000)
IN_LOG_DOMAIN = ("subtract", "log_softmax", "potentials", "duals", "softmax_end", "log_of_sum", "by_hand", "sinkformer")


def consistent(c):
    """The composition with choices that cannot go together replaced."""
    if c.layout == "none":
        c = replace(c, heads=1)
    if c.poison != "none" and c.post == "on_values":
        c = replace(c, post="plain")
    if c.post == "on_values" and not c.style.startswith("vectors"):
        c = replace(c, style="vectors_sum")
    if c.style == "vectors_matmul" and AXES[c.layout][-2:] != "nm":
        c = replace(c, style="vectors_sum")
    if c.poison != "none":
        c = replace(c, mask="none", marginals="none")
    if c.style in ("means", "sinkformer"):
        c = replace(c, mask="none")
    if c.poison in ("causal", "same_axis"):
        c = replace(c, cross=False)
    if c.mask == "finite" and c.style not in ("subtract", "log_softmax", "divide", "divide_in_place"):
        c = replace(c, mask="infinite")  # the others would bring padding back to life
    if c.mask == "zeros" and c.style not in ("divide", "divide_in_place", "vectors_sum", "vectors_matmul"):
        c = replace(c, mask="infinite")
    if c.marginals != "none":
        if c.style not in ("subtract", "divide", "vectors_sum", "potentials", "duals"):
            c = replace(c, style="vectors_sum" if c.post == "on_values" else "duals")
        c = replace(c, mask="none", post="plain" if c.post == "gated" else c.post)
    return c


def pick(random, poisoned, poison=None):
    """A composition drawn with a `random.Random`; of one poison, or any."""
    drawn = {name: random.choice(options) for name, options in CHOICES.items()}
    if not poisoned:
        if random.random() < 0.01:  # they take seconds to capture
            drawn |= {"half_steps": random.choice(LONG_LOOPS), "style": "subtract"}
        return consistent(Composition(**drawn))
    # Of long loops one in ten is left.
    poison = poison or random.choice([p for p in POISONS if p not in LONG or random.random() < 0.1])
    # Long ones are slow to capture, and of short ones no more can go wrong.
    drawn |= {"half_steps": min(drawn["half_steps"], 10), "tokens": min(drawn["tokens"], 8)}
    limit, constant = random.choice(LIMITS), random.choice(CONSTANTS)
    return consistent(Composition(**drawn, poison=poison, limit=limit, constant=constant))
