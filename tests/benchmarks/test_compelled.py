"""The second paper as a part of the study: each network is trained on its own, and errors are those on other points."""

import pytest
import torch

from asapc.relu.approx import bends_one_way
from benchmarks.study.compelled import by_adam, cases, draw, errors, section, unit, values

TEXTS = ["x**2", "exp(x)"]


@pytest.mark.parametrize("start", ["Kaiming", "construction", "pretraining"])
def test_networks_that_are_trained_together_are_those_trained_alone(start):
    x = unit(10)
    few, many = (by_adam(start, x, values(TEXTS[:1], x), runs, 20, 20) for runs in (2, 4))
    of_few, of_many = (errors(networks, TEXTS[:1], unit(50))[0] for networks in (few, many))
    assert torch.allclose(of_few, of_many[:2], rtol=1e-9)
    assert of_many.unique().numel() == 4


def test_pretraining_alone_helps_and_keeps_functions_convex():
    x = unit(30)
    start, trained = (by_adam("pretraining", x, values(TEXTS, x), 3, steps, 0) for steps in (0, 200))
    before, after = (errors(networks, TEXTS, x) for networks in (start, trained))
    assert after.shape == (2, 3)
    assert (after < before).all()
    with torch.no_grad():
        assert all(bends_one_way(outputs) for outputs in trained(unit(400)))


def test_errors_are_those_between_the_samples_too():
    x = unit(2)
    networks = by_adam("construction", x, values(TEXTS, x), 2, 0, 0)
    with torch.no_grad():
        expected = (networks(unit(9)) - values(TEXTS, unit(9)).repeat_interleave(2, dim=0)).square().mean(dim=-1)
    assert torch.equal(errors(networks, TEXTS, unit(9)).flatten(), expected)
    assert (errors(networks, TEXTS, unit(9)) > errors(networks, TEXTS, x)).all()


def test_quick_cases_of_each_kind_give_rows_from_which_the_section_is_written(tmp_path):
    quick = cases(quick=True)
    rows = {name: quick[name]() for name in ("table, x**3, 10 points", "digits, ReLU, width 8")}
    lines = list(section(rows))
    assert lines[0].startswith("## ")
    assert any("5.65e-06" in line for line in lines)  # the paper's, beside ours
    draw(rows, tmp_path)
    assert len(list(tmp_path.glob("study-*.png"))) == 1
