"""What figures show of a site is its plan, and its operator's."""

import pytest
import torch
from helpers.fitted import cached_teacher, sound
from helpers.tolerances import FLOAT32, difference

from asapc.fidelity.maps import MAX_SIZE, site_maps, spaced
from asapc.passes.record import record
from asapc.planning.operators import exact_operator


@pytest.fixture(scope="module")
def recorded():
    teacher = cached_teacher(sound)
    wiring = teacher.site.wiring
    names = {operand.node for operand in (*wiring.operands, wiring.plan)}
    return teacher.site, record(teacher.graph.program.module(), teacher.samples[:3], names)


def test_the_exact_operators_maps_are_the_teachers(recorded):
    site, values = recorded
    maps = site_maps(site, exact_operator(site), values, 3)
    assert maps.teacher.shape == maps.compiled.shape == (3, site.loop.queries, site.loop.keys)
    assert difference(maps.compiled, maps.teacher) < FLOAT32
    # Rows are normalised last: an entry is 1 where all are the same.
    assert maps.teacher.mean(dim=-1) == pytest.approx(torch.ones(3, site.loop.queries), rel=1e-4)
    assert maps.columns.shape == (2, 3, site.loop.keys)
    assert difference(maps.columns[0], maps.teacher.mean(dim=-2)) < FLOAT32


def test_the_head_is_the_one_that_differs_most(recorded):
    site, values = recorded

    def off_in(head):
        def operator(scores, queries, keys):
            plan = exact_operator(site)(scores, queries, keys)
            plan[:, head] = plan[:, head].flip(-1)
            return plan

        return site_maps(site, operator, values, 3)

    for head in range(site.loop.heads):
        maps = off_in(head)
        assert maps.head == head
        assert difference(maps.compiled, maps.teacher.flip(-1)) < FLOAT32


def test_a_loop_that_is_kept_differs_from_nothing(recorded):
    site, values = recorded
    maps = site_maps(site, None, values, 3)
    assert torch.equal(maps.teacher, maps.compiled)


@pytest.mark.parametrize("count", [1, 5, MAX_SIZE, MAX_SIZE + 1, 4096])
def test_of_many_as_many_are_shown_as_there_is_room_for_from_end_to_end(count):
    shown = spaced(count, MAX_SIZE).tolist()
    assert len(shown) == min(count, MAX_SIZE)
    assert (shown[0], shown[-1]) == (0, count - 1)
    assert sorted(set(shown)) == shown
