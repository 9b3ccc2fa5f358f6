"""What each budget would cost."""

from dataclasses import replace

import pytest
from helpers.fitted import cached_teacher, sound

from asapc.config import CompileConfig
from asapc.planning.alternatives import find_alternatives
from asapc.planning.check import Check
from asapc.planning.choose import decide
from asapc.planning.costs import shipped
from asapc.planning.tradeoffs import find_tradeoffs, term_of
from asapc.types.budget import parse_bound

CONFIG = CompileConfig(pieces=(0,), batches=(64,))


@pytest.fixture(scope="module")
def check():
    teacher = cached_teacher(sound, depth=2).studied
    return Check(teacher, find_alternatives(teacher, CONFIG, shipped()))


@pytest.fixture(scope="module")
def rows(check):
    return find_tradeoffs(check, CONFIG, lambda detail: None)


def test_rows_go_from_the_cheapest_to_the_exact_form(rows):
    costs = [row.cost for row in rows]
    assert costs == sorted(costs)
    assert len(set(costs)) > 2
    assert {choice.candidate.operator for choice in rows[-1].selection.choices.values()} == {"exact"}
    assert rows[-1].reached["output-error"] < 1e-4


def test_each_term_gives_its_row_and_the_row_keeps_it(check, rows):
    terms = [row for row in rows if row.term is not None]
    assert len(terms) > 2
    for row in terms:
        bound = parse_bound(row.term)
        assert bound.met(row.reached[bound.metric])
        chosen = decide(check, replace(CONFIG, fidelity=(row.term,)))
        assert check.name(chosen) == check.name(row.selection)


def test_the_row_of_the_budget_in_force_is_marked(check, rows):
    (chosen,) = (row for row in rows if row.chosen)
    assert check.name(chosen.selection) == check.name(decide(check, CONFIG))


def reached(agreement, error):
    return {"agreement": agreement, "output-error": error}


def test_a_term_is_what_cheaper_rows_miss():
    assert term_of(reached(0.95678, 0.1), []) == "agreement>=0.9567"
    assert term_of(reached(0.95678, 0.1), [reached(0.9567, 0.2)]) == "output-error<=0.1"
    assert term_of(reached(0.9, 0.0312), [reached(1.0, 0.2)]) == "output-error<=0.032"
    assert term_of(reached(None, 0.0312), [reached(None, 0.2)]) == "output-error<=0.032"
    assert term_of(reached(0.9, 0.3), [reached(1.0, 0.2)]) is None
    assert term_of(reached(None, 0.0), [reached(None, 0.1)]) is None


def test_a_term_leaves_room_for_another_order_of_sums():
    assert term_of(reached(1.0, 3e-7), [reached(1.0, 0.2)]) == "output-error<=1e-05"
    assert term_of(reached(1.0, 3e-7), [reached(1.0, 9e-6)]) is None
