"""The second paper as a part of the study: each network is trained on its own, and errors are those on other points."""

import torch

from asapc.relu.approx import bends_one_way
from asapc.relu.networks import ReLUNetworks
from benchmarks.study.compelled import by_adam, cases, draw, errors, section, start_of, unit, values

TEXTS = ["x**2", "exp(x)"]


def test_networks_that_are_trained_together_are_those_trained_alone():
    x = unit(10)
    y = values(TEXTS[:1], x)
    together = start_of("construction", x, y, 3, 0)
    alone = ReLUNetworks(*(parameter[1:2].detach().clone() for parameter in together.parameters()))
    start = errors(alone, TEXTS[:1], x)
    by_adam(together, x, y, 20), by_adam(alone, x, y, 20)
    assert (errors(alone, TEXTS[:1], x) < start).all()
    assert torch.allclose(errors(alone, TEXTS[:1], x)[0], errors(together, TEXTS[:1], x)[0, 1:2], rtol=1e-9)


def test_pretraining_helps_and_keeps_functions_convex():
    x = unit(30)
    before, after = (start_of("pretraining", x, values(TEXTS, x), 3, steps) for steps in (0, 200))
    assert (errors(after, TEXTS, x) < errors(before, TEXTS, x)).all()
    with torch.no_grad():
        assert all(bends_one_way(outputs) for outputs in after(unit(400)))


def test_errors_are_those_between_the_samples_too():
    x, between = unit(2), unit(9)
    networks = start_of("construction", x, values(TEXTS, x), 2, 0)
    with torch.no_grad():
        expected = (networks(between) - values(TEXTS, between).repeat_interleave(2, dim=0)).square().mean(dim=-1)
    assert torch.equal(errors(networks, TEXTS, between).flatten(), expected)
    assert (errors(networks, TEXTS, between) > errors(networks, TEXTS, x)).all()


def test_quick_cases_of_each_kind_give_rows_from_which_the_section_is_written(tmp_path):
    quick = cases(quick=True)
    names = ("table, x**3, 10 points", "schedule, x**3", "ten points, Chebyshev", "digits, ReLU, width 8")
    rows = {name: quick[name]() for name in names}
    lines = list(section(rows))
    assert lines[0].startswith("## ")
    assert sum("5.65e-06" in line for line in lines) == 1 + 6  # the paper's, beside ours
    assert any(line.startswith("| Chebyshev | 500 points |") for line in lines)
    draw(rows, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study-compelled.png"]
