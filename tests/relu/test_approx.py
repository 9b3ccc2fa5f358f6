"""Approximating functions of one variable: what is read, what is found, and what the command prints and writes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from asapc.cli import app
from asapc.errors import OptionError
from asapc.relu.approx import approximate, bends_one_way, best_pieces, parse_function, parse_interval
from asapc.relu.fit import fit, fit_manifold, random_networks, train
from asapc.relu.networks import count_pieces, to_networks

X = torch.linspace(0, 1, 200, dtype=torch.float64)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("x**3", lambda x: x**3),
        (" -x + 2*pi ", lambda x: -x + 2 * math.pi),
        ("tanh(3*x)/e", lambda x: torch.tanh(3 * x) / math.e),
        ("exp(-x**2)", lambda x: torch.exp(-(x**2))),
        ("1", torch.ones_like),
    ],
)
def test_expressions_are_read_as_python_reads_them(text, function):
    actual = parse_function(text)(X)
    assert actual.shape == X.shape
    assert torch.allclose(actual, function(X))


@pytest.mark.parametrize(
    "text",
    [
        *("", "x +", "y", "x.real", "x[0]", "__import__('os')", "open(x)", "sin(x, x)", "lambda: x", "x if x else x"),
        *("x < 1", "'x'", "True", "x;x", "sin", "(" * 500 + "x" + ")" * 500, "x+" * 2000 + "x", "1j"),
    ],
)
def test_anything_else_is_refused_with_a_hint(text):
    with pytest.raises(OptionError) as caught:
        parse_function(text)
    assert caught.value.hint
    assert len(str(caught.value)) < 500


def test_powers_of_numbers_do_not_explode():
    with pytest.raises(OptionError, match="finite"):
        approximate("9**9**9**9", depth=1, runs=1)


@pytest.mark.parametrize("text", ["", "1", "0,x", "0,1,2"])
def test_an_interval_has_two_ends(text):
    with pytest.raises(OptionError):
        parse_interval(text)


@pytest.mark.parametrize(
    "options",
    [{"depth": 0}, {"depth": 99}, {"points": 2}, {"runs": 0}, {"domain": (1.0, 0.0)}, {"domain": (0.0, math.inf)}],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(OptionError):
        approximate("x", **options)


def test_a_function_that_is_not_finite_is_refused_at_its_place():
    with pytest.raises(OptionError, match=r"x = 0\b"):
        approximate("log(x)", runs=1)


def test_a_fit_on_the_manifold_has_all_its_pieces_and_freedom_helps():
    y = (X**3).unsqueeze(0)
    bound, free = (fit(X, y, 4, runs=6, free=freed) for freed in (False, True))
    assert count_pieces(bound.best()) == 16
    assert free.errors.amin() < bound.errors.amin() / 10
    # Runs that start as torch starts them end far from there.
    kaiming = train(random_networks(X, 1, 6, 4, 0, "kaiming"), X, y, 1)
    assert free.errors.mean() < kaiming.errors.mean() / 10


def test_many_functions_are_fitted_at_once_as_each_alone():
    y = torch.stack([X**3, torch.exp(X), -torch.sqrt(X + 0.1)])
    together = fit(X, y, 3, runs=2, seed=1)
    assert together.errors.shape == (3, 2)
    for i in range(3):
        values = together.best(i)(X.unsqueeze(-1)).squeeze(-1)
        assert (values - y[i]).square().mean().item() == pytest.approx(together.errors[i].amin().item(), rel=1e-6)


def test_samples_at_the_ends_alone_are_met_time_after_time():
    ends, values = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    first = fit_manifold(ends, values, depth=5, runs=2, members=1, seed=0, steps=0)
    for _ in range(100):  # pivots from uninitialised memory are wrong one time in ten
        again = fit_manifold(ends, values, depth=5, runs=2, members=1, seed=0, steps=0)
        assert all(map(torch.equal, again, first))
    with torch.no_grad():
        assert torch.allclose(to_networks(first)(ends), values, atol=1e-12)


def test_few_samples_are_met_and_what_lies_between_is_left_to_the_manifold():
    x = torch.tensor([0.0, 0.93, 0.21, 0.34, 0.47, 0.58, 0.7, 0.82, 0.1, 1.0], dtype=torch.float64)
    y = torch.sin(x).unsqueeze(0)
    bound, free = (fit(x, y, 4, runs=8, free=freed) for freed in (False, True))
    assert free.errors.amax() < bound.errors.amin() / 2
    alone = train(bound.networks, x, y, 1)  # all the freedom there is, between samples too
    with torch.no_grad():
        errors = [(result.networks(X) - torch.sin(X)).square().mean() for result in (free, alone)]
    assert errors[0] < errors[1]


@pytest.mark.slow
def test_a_function_that_bends_both_ways_gets_two_networks():
    y = torch.sin(6 * X)
    assert not bends_one_way(y)
    assert bends_one_way(X**2)
    assert bends_one_way(2 * X + 1)
    result = approximate("sin(6*x)", depth=3, points=200, runs=4)
    assert result.network[0].out_features == 8
    assert next(row for row in result.rows if row.name == "compelled, then free, depth 3").mse < 1e-4


def test_the_best_pieces_are_better_than_equal_ones():
    x = X.numpy()
    y = x**11
    equal = np.interp(x, np.linspace(0, 1, 9), np.linspace(0, 1, 9) ** 11)
    error, of_equal = (np.mean((values - y) ** 2) for values in (np.interp(x, *best_pieces(x, y, 8)), equal))
    assert error < of_equal / 4


def test_the_command_prints_a_table_and_writes_the_network_and_a_picture():
    ran = CliRunner().invoke(app, ["approx", "x**2", "--depth", "2", "--domain=-1,1", "--runs", "2", "--plot", "p.png"])
    assert ran.exit_code == 0, ran.output
    assert "compelled, depth 2" in ran.stdout
    assert Path("p.png").read_bytes()[:4] == b"\x89PNG"
    model = onnx.load("approx.onnx")
    assert {node.op_type for node in model.graph.node} == {"Gemm", "Relu"}
    x = np.linspace(-1, 1, 50, dtype=np.float32)[:, None]
    actual = onnxruntime.InferenceSession("approx.onnx").run(None, {"input": x})[0]
    assert np.abs(actual - x**2).max() < 0.1
    assert sorted(path.name for path in Path().iterdir()) == ["approx.onnx", "p.png"]


def test_the_command_prints_json_and_replaces_nothing_unasked():
    arguments = ["approx", "exp(x)", "--depth", "1", "--runs", "1", "--json"]
    # In a process of its own, where no other test has imported anything.
    command = [sys.executable, "-m", "asapc", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout)["rows"]
    assert {row["pieces"] for row in rows if row["name"].startswith("compelled, depth")} == {2}
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "--force" in again.stderr


@pytest.mark.parametrize(
    "arguments", [["x**"], ["x", "--domain", "2"], ["1/x"], ["x", "--depth", "50"], ["x", "--plot", "p.c"]]
)
def test_wrong_input_leaves_nothing_behind(arguments):
    ran = CliRunner().invoke(app, ["approx", *arguments, "--runs", "1"])
    assert ran.exit_code == 1
    assert ran.stderr.startswith("error: ")
    assert list(Path().iterdir()) == []
