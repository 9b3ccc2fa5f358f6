"""2,000 mutated files of every format: refused in one line, or read as torch's own strict load reads them."""

import random

import pytest
from helpers.mutations import READ, mutate, whole
from helpers.references import check, check_command

COUNT = 2000 // len(READ) + 1
OUTCOMES = {"refused", "read", "read in part"}


@pytest.mark.parametrize("format_", READ, ids=lambda format_: format_.name)
def test_a_mutated_file_is_refused_or_its_weights_are_those_of_a_strict_load(format_):
    tree, rng = whole(format_), random.Random(format_.name)
    before = check(format_, tree)
    outcomes = {check(format_, mutate(tree, rng)) for _ in range(COUNT)}
    assert {"refused", before} <= outcomes <= OUTCOMES
    assert check_command(format_, mutate(tree, rng)) in OUTCOMES
