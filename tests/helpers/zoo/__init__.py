"""A zoo of models with and without Sinkhorn loops, each in the coding style of somebody else."""

from . import early_stop, epsilon, heads, inside, log_domain, masks, negatives, origins, plans, scaling_domain
from .case import Case, Expected

POSITIVES: tuple[Case, ...] = (
    *log_domain.CASES,
    *scaling_domain.CASES,
    *heads.CASES,
    *origins.CASES,
    *epsilon.CASES,
    *masks.CASES,
    *early_stop.CASES,
    *plans.CASES,
    *inside.CASES,
)
NEGATIVES: tuple[Case, ...] = tuple(negatives.CASES)

__all__ = ["NEGATIVES", "POSITIVES", "Case", "Expected"]
