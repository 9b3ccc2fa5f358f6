"""The command: what it prints, where, and the exit codes of the design's table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from helpers.command import assert_user_error, run, write_checkpoint
from helpers.paths import ROOT

import asapc.commands.compile
import asapc.commands.inspect
from asapc.config import CompileConfig
from asapc.errors import FidelityError
from asapc.loading.model import load_model
from asapc.types.graph import EarlyStops
from asapc.types.site import Findings, Miss

INSPECT_SCHEMA = json.loads((ROOT / "docs" / "inspect.schema.json").read_text())
QUICK = ("--batch", "1", "--seconds", "0.05", "--threads", "1")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Threads that compete with other processes for the cores wait for each other most of the time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small") / "small.pt")


def test_the_version_is_printed_alone():
    result = run("--version")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{asapc.__version__}\n", "")


def test_help_names_the_commands_and_the_options():
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("compile", "inspect", "train"))
    result = run("compile", "--help")
    assert result.exit_code == 0
    for option in (
        "--out",
        "--force",
        "--calib",
        "--fidelity",
        "--model",
        "--model-args",
        "--inputs",
        "--input-shape",
        "--unsafe-load",
        "--slices",
        "--seed",
        "--config",
        "--json",
        "--quiet",
    ):
        assert option in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("compile",),
        ("inspect",),
        ("translate", "model.pt"),
        ("compile", "model.pt", "--colour"),
        ("compile", "model.pt", "--seed", "many"),
        ("train", "digits", "--epochs", "0"),
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_the_module_runs_as_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "asapc.cli", "--version"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"{asapc.__version__}\n")


def test_inspect_prints_a_row_for_each_site(shipped):
    result = run("inspect", shipped)
    assert result.exit_code == 0, result.stderr
    sites = len(load_model(shipped).module.blocks)
    rows = [line.split() for line in result.stdout.splitlines() if "attention" in line and "64 x 64" in line]
    assert len(rows) == sites
    for row in rows:
        assert {"40", "rows", "0.25"} <= set(row)
    assert "vit.py:" in result.stdout  # where the code stands


def test_inspect_json_is_json_alone(shipped):
    result = run("inspect", shipped, "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    jsonschema.validate(data, INSPECT_SCHEMA)
    assert data["schema"] == "asapc.inspect/1"
    assert data["sites"]
    for site in data["sites"]:
        assert (site["half_steps"], site["last"], site["epsilon"], site["queries"]) == (40, "rows", 0.25, 64)
    assert data["misses"] == []


def test_inspect_why_says_what_was_turned_down(tmp_path):
    softmax = write_checkpoint(tmp_path / "softmax.pt", iterations=0)
    result = run("inspect", softmax, "--why")
    _, hint = assert_user_error(result)
    assert hint == "hint: nothing is to be done"  # and not to run what was run
    miss = next(line for line in result.stdout.splitlines() if line.startswith("miss: "))
    assert "vit.py:" in miss
    assert "softmax" in miss
    assert "miss: " not in run("inspect", softmax).stdout


def test_inspect_says_of_a_site_and_a_miss_what_the_finder_says(shipped, monkeypatch):
    miss = Miss("matmul_1", None, "the reason [in brackets]", "a hint")  # which rich must not take for markup
    monkeypatch.setattr(asapc.commands.inspect, "inspect_model", lambda *args: Findings((), (miss,)))
    result = run("inspect", shipped, "--why")
    assert "miss: no source line (node matmul_1): the reason [in brackets]; a hint" in result.stdout
    data = json.loads(run("inspect", shipped, "--json").stdout)
    jsonschema.validate(data, INSPECT_SCHEMA)
    assert data["misses"] == [
        {"node": "matmul_1", "source": None, "reason": "the reason [in brackets]", "hint": "a hint"}
    ]


def test_an_error_names_lines_as_the_table_does_and_no_misses_where_there_are_none(shipped, monkeypatch):
    miss = Miss("matmul_1", str(Path.cwd() / "model.py:3"), "the reason", "a hint")
    monkeypatch.setattr(asapc.commands.inspect, "inspect_model", lambda *args: Findings((), (miss,)))
    assert "; model.py:3: the reason" in assert_user_error(run("inspect", shipped))[0]
    monkeypatch.setattr(asapc.commands.inspect, "inspect_model", lambda *args: Findings((), ()))
    assert "--why" not in assert_user_error(run("inspect", shipped))[1]


def test_inspect_prints_which_early_stops_are_left_out_and_what_that_changes(shipped, monkeypatch):
    stops = EarlyStops({"sinkhorn.py:7": "if err < tol:"}, 2e-3, taken=True)
    monkeypatch.setattr(asapc.commands.inspect, "inspect_model", lambda *args: Findings((), (), stops))
    result = run("inspect", shipped)
    assert "early stop at sinkhorn.py:7" in result.stdout
    assert "2.0e-03" in result.stdout
    data = json.loads(run("inspect", shipped, "--json").stdout)
    jsonschema.validate(data, INSPECT_SCHEMA)
    assert data["early_stops"]["stops"] == [{"source": "sinkhorn.py:7", "question": "if err < tol:"}]
    assert data["early_stops"]["difference"] == 2e-3


STOPPING = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = x * self.scale
        for _ in range(9):
            x, before = x.cos(), x
            if (x - before).abs().max() < 0.5:
                break
        return x
"""


def test_a_model_that_stops_early_is_refused_where_that_is_asked_for():
    written(Path("stopping.py"), STOPPING.encode())
    torch.save({"scale": torch.ones(3)}, "weights.pt")
    np.savez("s.npz", x=np.random.default_rng(0).random((24, 3), dtype=np.float32))
    arguments = ("compile", "weights.pt", "--model", "stopping:Model", "--calib", "s.npz", *QUICK)
    error, hint = assert_user_error(run(*arguments, "--early-stop", "refuse"))
    assert "stopping.py:14" in error
    assert "--early-stop bound" in hint
    assert "no Sinkhorn attention" in assert_user_error(run(*arguments))[0]  # which is looked for later


def test_a_model_without_sinkhorn_exits_with_1_and_writes_nothing(tmp_path):
    softmax = write_checkpoint(tmp_path / "softmax.pt", iterations=0)
    for command in ("compile", "inspect"):
        error, hint = assert_user_error(run(command, softmax))
        assert "no Sinkhorn attention" in error
        assert f"`asapc inspect {softmax} --why`" in hint
    result = run("inspect", softmax, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["sites"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["softmax.pt"]


def samples(path: Path, count: int = 24, shape: tuple[int, ...] = (4, 4), dtype=np.float32, **more) -> Path:
    images = np.random.default_rng(0).random((count, *shape)).astype(dtype)
    np.savez(path, **{"images": images, **more})
    return path


def truncated(path: Path, source: Path) -> Path:
    path.write_bytes(source.read_bytes()[:2000])
    return path


def pickled(path: Path) -> Path:
    class Runs:
        def __reduce__(self):
            return os.mkdir, ("marker",)

    torch.save({"format": "asapc.checkpoint/1", "model": Runs()}, path)
    return path


def without(path: Path, weight: str) -> Path:
    weights = dict(torch.load(write_checkpoint(path), weights_only=True)["state_dict"])
    del weights[weight]
    return write_checkpoint(path, state_dict=weights)


def with_nan() -> dict:
    images = np.zeros((24, 4, 4), dtype=np.float32)
    images[3, 2, 1] = np.nan
    return {"images": images}


def written(path: Path, content: bytes = b"") -> Path:
    path.write_bytes(content)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


# Each makes its files in the working directory and returns the arguments after `compile`, with a word of the message.
BAD_INPUTS = {
    "missing file": (lambda small: ["missing.pt"], "no such file"),
    "path below a file": (lambda small: [small / "model.pt"], "small.pt"),
    "folder": (lambda small: [folder(Path("model.pt"))], "folder"),
    "empty file": (lambda small: [written(Path("empty.pt"))], "empty"),
    "truncated file": (lambda small: [truncated(Path("half.pt"), small)], "damaged"),
    "no checkpoint": (lambda small: [written(Path("text.pt"), b"hello\n")], "text.pt"),
    "pickle that runs code": (lambda small: [pickled(Path("evil.pt"))], "run code"),
    "missing weights": (lambda small: [without(Path("part.pt"), "head.bias")], "head.bias"),
    "extra weights": (
        lambda small: [
            write_checkpoint(
                Path("more.pt"),
                state_dict={**torch.load(small, weights_only=True)["state_dict"], "surplus": torch.zeros(1)},
            )
        ],
        "surplus",
    ),
    "no samples": (lambda small: [write_checkpoint(Path("bare.pt"), calibration=None)], "calibration"),
    "missing samples": (lambda small: [small, "--calib", "missing.npz"], "no such file"),
    "samples of the wrong shape": (
        lambda small: [small, "--calib", samples(Path("s.npz"), shape=(5, 5))],
        "(24, 5, 5)",
    ),
    "samples of the wrong rank": (lambda small: [small, "--calib", samples(Path("s.npz"), shape=(16,))], "(24, 16)"),
    "samples of the wrong dtype": (lambda small: [small, "--calib", samples(Path("s.npz"), dtype=np.uint8)], "uint8"),
    "samples in float64": (lambda small: [small, "--calib", samples(Path("s.npz"), dtype=np.float64)], "float64"),
    "samples of another name": (lambda small: [small, "--calib", samples(Path("s.npz"), pixels=np.ones(24))], "pixels"),
    "samples with NaN": (lambda small: [small, "--calib", samples(Path("s.npz"), **with_nan())], "NaN"),
    "too few samples": (lambda small: [small, "--calib", samples(Path("s.npz"), count=5)], "too few"),
    "no samples at all": (lambda small: [small, "--calib", samples(Path("s.npz"), count=0)], "too few"),
    "labels that are no classes": (
        lambda small: [small, "--calib", samples(Path("s.npz"), labels=np.eye(24))],
        "labels",
    ),
    "labels that the model does not know": (
        lambda small: [small, "--calib", samples(Path("s.npz"), labels=np.full(24, 99))],
        "from 99 to 99, the model tells 3 classes apart",
    ),
    "unwritable output": (
        lambda small: [small, "--out", written(Path("file")) / "out"],
        "cannot write",
    ),
    "existing output": (lambda small: [small, "--out", folder(Path("mine"))], "exists"),
    "output that asapc did not write": (lambda small: [small, "--out", folder(Path("mine")), "--force"], "mine"),
    "output with too long a name": (lambda small: [small, "--out", "x" * 300], ""),
    "unknown budget": (lambda small: [small, "--fidelity", "beauty>=1"], "beauty"),
    "budget the wrong way round": (lambda small: [small, "--fidelity", "agreement<=1"], "agreement"),
    "unknown rule": (lambda small: [small, "--early-stop", "maybe"], "maybe"),
    "unknown level": (lambda small: [small, "-O", "7"], "level"),
    "negative slices": (lambda small: [small, "--slices", "-1"], "slices"),
    "batch of none": (lambda small: [small, "--batch", "0"], "batches"),
    "batch beyond memory": (lambda small: [small, "--batch", "10000000"], "batches"),
    "threads beyond measure": (lambda small: [small, "--threads", "100000"], "threads"),
    "no time": (lambda small: [small, "--seconds", "0"], "seconds"),
    "missing options": (lambda small: [small, "--config", "missing.toml"], "missing.toml: no such file"),
    "unknown rule in the options": (
        lambda small: [small, "--config", written(Path("o.toml"), b'early_stop = "maybe"')],
        "maybe",
    ),
    "weights without a model": (lambda small: weights_alone(small)[:1], "which model"),
    "unknown model": (lambda small: [*weights_alone(small)[:2], "no_such_module:build"], "no_such_module"),
    "arguments that are no JSON": (lambda small: [*weights_alone(small)[:4], "{"], "arguments"),
    "arguments of another model": (lambda small: [*weights_alone(small)[:4], '{"colour": 1}'], "TypeError"),
    "unreadable input shape": (lambda small: [small, "--input-shape", "x"], "input shape"),
    "missing example inputs": (lambda small: [small, "--inputs", "missing.npz"], "missing.npz"),
    "device": (lambda small: ["/dev/zero"], "regular"),
    "damaged ONNX": (lambda small: [written(Path("model.onnx"), b"x")], "damaged"),
    "unknown option": (lambda small: [small, "--config", written(Path("o.toml"), b"colour = 1")], "colour"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_gets_one_message_and_a_hint_and_nothing_is_written(name, small):
    make, word = BAD_INPUTS[name]
    arguments = make(small)
    before = sorted(Path.cwd().rglob("*"))
    error, hint = assert_user_error(run("compile", *QUICK, *arguments))
    assert word in error
    assert len(hint) > len("hint: ")
    assert sorted(Path.cwd().rglob("*")) == before  # hidden leftovers would show
    assert [path.name for path in small.parent.iterdir()] == ["small.pt"]


def test_train_refuses_a_recipe_that_there_is_none_of():
    error, hint = assert_user_error(run("train", "cifar"))
    assert "cifar" in error
    assert "digits" in hint


def test_inspect_refuses_bad_input_as_compile_does(small):
    for arguments in (["missing.pt"], [small, "--calib", "missing.npz"], [written(Path("empty.pt"))]):
        assert_user_error(run("inspect", *arguments))


def weights_alone(small: Path, name: str = "weights.pt") -> list[object]:
    """The weights of a checkpoint in a file of their own, and the options that name their model."""
    content = torch.load(small, weights_only=True)
    torch.save({"epoch": 3, "model": {f"module.{k}": v for k, v in content["state_dict"].items()}}, name)
    return [name, "--model", content["model"], "--model-args", json.dumps(content["model_args"])]


def test_inspect_reads_weights_and_says_where_it_found_them_and_what_it_probes_with(small):
    result = run("inspect", *weights_alone(small), "--input-shape", "images=2,4,4")
    assert result.exit_code == 0, result.stderr
    assert "16 x 16" in result.stdout
    for words in ("'model'", "'module.'", "random inputs"):
        assert words in result.stderr
    result = run("inspect", *weights_alone(small), "--inputs", samples(Path("s.npz"), count=2))
    assert result.exit_code == 0, result.stderr
    assert "random" not in result.stderr


def test_compile_never_calibrates_on_random_inputs(small):
    for example in (["--input-shape", "images=2,4,4"], ["--inputs", samples(Path("s.npz"), count=64)]):
        error, hint = assert_user_error(run("compile", *weights_alone(small), *example, *QUICK))
        assert "calibration" in error
        assert "--calib" in hint


def test_compile_takes_weights_and_real_samples(small):
    result = run("compile", *weights_alone(small), "--calib", samples(Path("s.npz"), count=64), *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "16 x 16" in result.stdout
    assert "'module.'" in result.stderr
    assert Path("weights.asap/model.onnx").is_file()


def archive(path: Path, small: Path, **options) -> Path:
    batch = torch.export.Dim("batch")
    module, example = load_model(small).module, (torch.rand(2, 4, 4),)
    torch.export.save(torch.export.export(module, example, dynamic_shapes=({0: batch},)), path)
    return path


def test_inspect_and_compile_take_an_exported_program(small):
    path = archive(Path("model.pt2"), small)
    result = run("inspect", path)
    assert result.exit_code == 0, result.stderr
    assert "16 x 16" in result.stdout
    assert "vit.py:" in result.stdout
    result = run("compile", path, "--calib", samples(Path("s.npz"), count=64), *QUICK)
    assert result.exit_code == 0, result.stderr
    assert Path("model.asap/model.onnx").is_file()


def test_unsafe_load_warns_before_it_runs_anything(small):
    torch.save(load_model(small).module, "module.pt")
    error, hint = assert_user_error(run("inspect", "module.pt", "--input-shape", "images=2,4,4"))
    assert "run code" in error
    assert "--unsafe-load" in hint
    result = run("inspect", "module.pt", "--unsafe-load", "--input-shape", "images=2,4,4")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("warning: --unsafe-load runs code")


def test_inspect_takes_its_options_from_a_file_too(small):
    name, _, model, _, args = weights_alone(small)
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in json.loads(args).items())
    text = f'model = "{model}"\nmodel_args = {{{table}}}\ninput_shape = ["images=2,4,4"]\n'
    result = run("inspect", name, "--config", written(Path("o.toml"), text.encode()))
    assert result.exit_code == 0, result.stderr


def test_a_missed_budget_exits_with_3_and_leaves_no_folder(small):
    error, _ = assert_user_error(run("compile", small, "--fidelity", "agreement>=1.1", *QUICK), code=3)
    assert "agreement>=1.1" in error
    assert list(Path.cwd().iterdir()) == []


def test_a_missed_budget_leaves_an_earlier_output_as_it_was(small, monkeypatch):
    out = folder(Path("out"))
    written(out / "manifest.json", b'{"schema": "asapc.manifest/1"}')

    def refuse(*args):
        raise FidelityError("missed", "try again")

    monkeypatch.setattr(asapc.commands.compile, "capture", refuse)  # long before the real gate, to save time
    assert_user_error(run("compile", small, "--out", out, "--force", *QUICK), code=3)
    assert [str(path) for path in Path().rglob("*")] == ["out", "out/manifest.json"]


def test_a_defect_exits_with_70_a_traceback_and_a_request_to_report_it(small, monkeypatch):
    def broken(*args):
        raise RuntimeError("the wheel came off [axle]")

    monkeypatch.setattr(asapc.commands.compile, "compile_model", broken)
    result = run("compile", small)
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "RuntimeError: the wheel came off [axle]" in result.stderr
    assert "report" in result.stderr
    assert not any(line.startswith("hint: ") for line in result.stderr.splitlines())
    assert result.stdout == ""


def test_options_reach_the_library_and_those_on_the_command_line_win(small, monkeypatch):
    seen = []
    monkeypatch.setattr(asapc.commands.compile, "compile_model", lambda *args: seen.extend(args[:2]) or 1 / 0)
    toml = written(Path("o.toml"), b'seed = 1\nthreads = 3\nslices = [4]\nout = "there"\n')
    run("compile", small, "--config", toml, "--seed", 2, "--batch", 1, "--batch", 8, "--fidelity", "relc<=0.1")
    assert seen == [
        small,
        CompileConfig(out=Path("there"), seed=2, threads=3, slices=(4,), batches=(1, 8), fidelity=("relc<=0.1",)),
    ]


@pytest.fixture(scope="module")
def compiled(small, tmp_path_factory):
    """The small model, compiled once by the real command in a process of its own."""
    place = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, "-m", "asapc.cli", "compile", small, *QUICK, "--fidelity", "relc<=1"]
    result = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return place, result


def test_compile_writes_beside_the_caller_under_the_models_name(compiled):
    place, _ = compiled
    assert [path.name for path in place.iterdir()] == ["small.asap"]
    assert (place / "small.asap" / "model.onnx").is_file()


def test_compile_shows_stages_with_their_times_on_stderr(compiled):
    _, result = compiled
    lines = [line.split() for line in result.stderr.splitlines()]
    stages = ["load", "capture", "find", "plan", "rewrite", "export", "engine", "verify", "measure"]
    assert [line[0] for line in lines] == stages
    for line in lines:
        assert float(line[1]) >= 0
        assert line[2] == "s"


def test_compile_prints_two_tables_and_where_the_files_are(compiled):
    _, result = compiled
    assert "Sinkhorn attention" in result.stdout
    assert "Latency in ONNX Runtime" in result.stdout
    for variant in ("teacher", "exact", "truncated", "softmax", "compiled"):
        assert any(variant in line.split() for line in result.stdout.splitlines())
    for file in ("model.onnx", "model.engine", "operator.safetensors", "report.json"):
        assert f"small.asap/{file}" in result.stdout
    assert "\x1b" not in result.stdout  # no colours in a pipe


def given(report_folder: Path, monkeypatch) -> dict:
    """Let `compile` return what a run left behind, and return the report's data."""
    data = json.loads((report_folder / "report.json").read_text())
    report = asapc.CompileReport(report_folder, data)
    monkeypatch.setattr(asapc.commands.compile, "compile_model", lambda *args: report)
    return data


def test_compile_json_prints_the_report_alone_on_stdout(compiled, small, monkeypatch):
    data = given(compiled[0] / "small.asap", monkeypatch)
    result = run("compile", small, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == data


def test_compile_quiet_prints_nothing(compiled, small, monkeypatch):
    given(compiled[0] / "small.asap", monkeypatch)
    result = run("compile", small, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_quiet_still_prints_errors():
    assert_user_error(run("compile", "missing.pt", "--quiet"))


def test_ctrl_c_within_an_executed_string_exits_with_130():
    code = """
from asapc import cli
cli.options_of = lambda *_: exec("print('begun', flush=True)\\nwhile True: pass")
cli.main()
"""
    Path("interrupted.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "-m", "interrupted", "compile", "any.pt"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()


# After the export NVIDIA's compiler runs, whose callbacks into Python swallow exceptions.
@pytest.mark.parametrize("stage", ["load", "export"])
def test_ctrl_c_exits_with_130_and_leaves_nothing_behind(stage, small):
    # A shell that runs the tests in the background ignores SIGINT, and its children would inherit that.
    process = subprocess.Popen(
        [sys.executable, "-m", "asapc.cli", "compile", small, *QUICK, "--out", "deep/out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.split()[:1] == [stage]:
                break
        time.sleep(0.2)  # into the next stage
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, "".join(lines) + rest
    assert out == ""
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert list(Path.cwd().iterdir()) == []


def test_train_writes_a_checkpoint_that_loads_and_is_not_overwritten(tmp_path):
    result = run("train", "digits", "--epochs", 1, "--seed", 3, "--out", "model.pt")
    assert result.exit_code == 0, result.output
    assert "model.pt: held-out accuracy" in result.stdout
    assert "softmax twin" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]

    loaded = load_model(Path("model.pt"))
    assert len(loaded.calibration) == 64
    assert len(loaded.held_out) == 500
    facts = torch.load("model.pt", weights_only=True)["training"]
    assert (facts["seed"], facts["epochs"]) == (3, 1)
    with torch.no_grad():
        right = loaded.module(loaded.held_out.inputs["images"]).argmax(dim=-1) == loaded.held_out.labels
    assert facts["held_out_accuracy"] == pytest.approx(right.double().mean().item(), abs=0.002)

    before = Path("model.pt").read_bytes()
    error, hint = assert_user_error(run("train", "digits", "--epochs", 1, "--out", "model.pt"))
    assert "exists" in error
    assert "--force" in hint
    assert Path("model.pt").read_bytes() == before


def test_train_refuses_an_output_that_cannot_be_written_before_it_trains():
    written(Path("file"))
    assert_user_error(run("train", "digits", "--out", "file/model.pt"))
    assert [path.name for path in Path.cwd().iterdir()] == ["file"]
