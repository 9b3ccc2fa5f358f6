"""What is said of sites in words."""

import pytest

from asapc.showing import fusion, reach, why_not_shorter


def site(name="attention", operator="exact", reason="no approximation is cheaper", **facts):
    return {"name": name, "choice": {"operator": operator, "reason": reason}, "guarded": True, "reach": 2.0, **facts}


def test_sites_that_keep_all_half_steps_say_why_unless_that_was_asked_for():
    others = [site("mean", "truncated"), site("plain", reason="-O1 asks for the exact form")]
    assert list(why_not_shorter([site(), *others])) == ["attention keeps all half-steps: no approximation is cheaper"]
    several = [site(name, "keep") for name in "abcd"]
    assert list(why_not_shorter(several)) == ["a and b and others keep all half-steps: no approximation is cheaper"]
    assert list(why_not_shorter(others)) == []


def test_a_loop_that_stays_is_not_said_to_be_in_no_layer():
    layers = [{"sites": [], "kind": "kernel", "attention": False}]
    assert "stays as it was written" in fusion(site(operator="keep"), layers)
    assert "in no layer" in fusion(site(), layers)


@pytest.mark.parametrize(("operator", "lines"), [("exact", 0), ("amortised", 0), ("sliced_dual", 1), ("truncated", 1)])
def test_constants_that_an_operator_carries_are_no_matter(operator, lines):
    assert len(list(reach(site(operator=operator)))) == lines
    (line,) = reach(site(operator="sliced_dual", reach=1.0))
    assert line.endswith("it changes the plan on scores of the samples")
