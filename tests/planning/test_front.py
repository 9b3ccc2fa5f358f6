"""Fronts of the whole model, on sites whose candidates have known costs and errors."""

from itertools import pairwise

import pytest

from asapc.planning.front import LEFT, error, model_front
from asapc.types.choices import Candidate, Choice, Selection
from asapc.types.results import SiteFidelity


def candidate(cost, relc, operator="sliced_dual"):
    return Candidate(operator, 3, cost, SiteFidelity(relc, 0.0, 0.0, 0.0))


def rows_of(*curves):
    """The front of sites with these candidates, cheapest first, as the numbers of their candidates."""
    names = [f"site {number}" for number in range(len(curves))]
    cheapest = {name: Choice(curve[0], "", tuple(curve)) for name, curve in zip(names, curves, strict=True)}
    closest = {name: Choice(curve[-1], "", tuple(curve)) for name, curve in zip(names, curves, strict=True)}
    rows = model_front(Selection(cheapest), closest, "closer")
    return [
        tuple(curve.index(row.choices[name].candidate) for name, curve in zip(names, curves, strict=True))
        for row in rows
    ]


def test_a_front_goes_from_the_cheapest_to_the_closest_where_that_helps_most_for_its_cost():
    steep, flat = [candidate(1, 0.5), candidate(2, 0.1)], [candidate(1, 0.5), candidate(4, 0.1)]
    assert rows_of(steep, flat) == [(0, 0), (1, 0), (1, 1)]


def test_a_row_leaves_at_most_a_share_of_the_error_of_the_row_before_but_the_last_is_there():
    curve = [candidate(1 + number, 0.9**number) for number in range(12)]
    rows = rows_of(curve)
    errors = [curve[number].fidelity.relc for (number,) in rows]
    assert rows[0] == (0,)
    assert rows[-1] == (11,)
    assert 4 < len(rows) < len(curve)
    assert all(after <= LEFT * before for before, after in pairwise(errors[:-1]))


def test_a_loop_that_is_kept_is_a_row_of_its_own_after_all_approximations():
    rough, close = candidate(1, 0.5), candidate(2, 0.1)
    kept = Candidate("keep", 40, float("inf"))
    rows = model_front(
        Selection({"a": Choice(rough, "", (rough, close))}), {"a": Choice(kept, "", (rough, close))}, "closer"
    )
    assert [row.choices["a"].candidate for row in rows] == [rough, close, kept]


def test_errors_of_sites_add_up_as_if_independent():
    sites = {"a": Choice(candidate(1, 0.3), ""), "b": Choice(candidate(1, 0.4), "")}
    assert error(Selection(sites)) == pytest.approx(0.5)
