"""Options: what they take, and what they refuse with a message instead of a traceback."""

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

from asapc.config import MAX_THREADS, OPTIONS, CompileConfig
from asapc.errors import OptionError
from asapc.types.budget import METRICS, Bound, parse_bound


@pytest.mark.parametrize(
    ("text", "metric", "limit"),
    [
        ("agreement>=0.99", "agreement", 0.99),
        ("  relc <= 5e-2 ", "relc", 0.05),
        ("metric-drop<=0.5", "metric-drop", 0.5),
        ("metric-drop<=-0.5", "metric-drop", -0.5),
        ("column-marginal<=1E-3", "column-marginal", 1e-3),
    ],
)
def test_a_budget_is_read_as_written(text, metric, limit):
    assert parse_bound(text) == Bound(metric, limit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "agreement",
        "agreement>=",
        ">=0.9",
        "agreement>0.9",
        "agreement=0.9",
        "agreement<=0.9",
        "relc>=0.1",
        "Agreement>=0.9",
        "accuracy>=0.9",
        "agreement>=high",
        "agreement>=nan",
        "agreement>=1.2.3",
        "agreement>=1e",
        "agreement>=0.9, relc<=0.1",
    ],
)
def test_a_budget_that_cannot_be_read_is_refused_with_the_metrics_there_are(text):
    with pytest.raises(OptionError) as caught:
        parse_bound(text)
    assert repr(text) in str(caught.value)
    assert all(metric in caught.value.hint for metric in METRICS)


def test_what_a_shell_leaves_of_an_unquoted_budget_is_refused_with_the_quoted_form():
    with pytest.raises(OptionError) as caught:
        CompileConfig(fidelity=("agreement",))
    assert "--fidelity 'agreement>=0.99'" in caught.value.hint


def test_a_bound_says_itself_as_it_is_written():
    for text in ("agreement>=0.99", "relc<=0.05"):
        assert str(parse_bound(text)) == text


def test_a_bound_is_met_up_to_its_limit_and_never_by_nan():
    low, high = Bound("agreement", 0.9), Bound("relc", 0.1)
    assert low.met(0.9)
    assert not low.met(0.89)
    assert high.met(0.1)
    assert not high.met(0.11)
    assert not low.met(float("nan"))
    assert not high.met(float("nan"))


def test_a_config_reads_its_budget_when_it_is_made():
    assert CompileConfig(fidelity=("relc<=0.1",)).bounds() == (Bound("relc", 0.1),)
    with pytest.raises(OptionError):
        CompileConfig(fidelity=("relc<=0.1", "nonsense"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slices", (-1,)),
        ("slices", ()),
        ("pieces", (-1,)),
        ("level", 3),
        ("batches", (0,)),
        ("batches", (1, -32)),
        ("batches", ()),
        ("batches", (1, 10**7)),  # more than any memory
        ("threads", -1),
        ("threads", 100_000),  # crashed ONNX Runtime
        ("threads", MAX_THREADS + 1),
        ("seed", -1),
        ("seed", 2**64),  # torch takes 64 bits
        ("seconds", 0.0),
        ("seconds", -1.0),
        ("seconds", float("nan")),
        ("seconds", float("inf")),  # would never end
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(OptionError) as caught:
        CompileConfig(**{name: value})
    flag = OPTIONS[name].flag
    assert str(caught.value).startswith(f"{flag} cannot be ")
    assert flag in caught.value.hint
    assert name in caught.value.hint


def toml(folder: Path, text: str) -> Path:
    path = folder / "options.toml"
    path.write_text(text)
    return path


EVERY_OPTION = """
out = "folder"
force = true
samples_in_folder = 2
dump = "stages"
calib = "samples.npz"
fidelity = ["agreement>=0.9", "relc<=0.1"]
model = "my_models:build"
weights = "ema"
inputs = "inputs.npz"
input_shape = ["x=2,3", "ids=2,5:int64:0..9"]
unsafe_load = true
early_stop = "refuse"
level = 1
no_cache = true
lowering = "fused"
target = "onnx"
costs = "costs.json"
precision = "float16"
relu_activations = 1e-3
dynamic = "seq=16:64"
output_names = "logits,attention"
operators = "sorted, exact"
slices = [0, 4]
pieces = [4]
gpu_arch = "sm86,sm120"
workspace = "2GB"
profile = ["x=1x3:2x3:4x3"]
timing_cache = "times.bin"
version_compatible = true
hardware_compatible = true
batches = [1, 8]
seconds = 2
threads = 1
seed = 3
[model_args]
depth = 4
"""


@pytest.mark.parametrize("spelling", ["name", "key"])
def test_every_option_can_stand_in_a_toml_file(spelling, tmp_path):
    text = EVERY_OPTION
    for option in OPTIONS.values():
        text, count = re.subn(rf"^(\[?){option.name}\b", rf"\g<1>{getattr(option, spelling)}", text, flags=re.MULTILINE)
        assert count == 1
    path = toml(tmp_path, text)
    config = CompileConfig.from_toml(path, trusted=True)
    assert config == CompileConfig(
        out=Path("folder"),
        force=True,
        samples_in_folder=2,
        dump=Path("stages"),
        calib=Path("samples.npz"),
        fidelity=("agreement>=0.9", "relc<=0.1"),
        model="my_models:build",
        weights="ema",
        model_args={"depth": 4},
        inputs=Path("inputs.npz"),
        input_shape=("x=2,3", "ids=2,5:int64:0..9"),
        unsafe_load=True,
        early_stop="refuse",
        level=1,
        no_cache=True,
        lowering="fused",
        target="onnx",
        costs=Path("costs.json"),
        precision="float16",
        relu_activations=1e-3,
        dynamic="seq=16:64",
        output_names="logits,attention",
        operators="sorted, exact",
        slices=(0, 4),
        pieces=(4,),
        gpu_arch="sm86,sm120",
        workspace="2GB",
        profile=("x=1x3:2x3:4x3",),
        timing_cache=Path("times.bin"),
        version_compatible=True,
        hardware_compatible=True,
        batches=(1, 8),
        seconds=2.0,
        threads=1,
        seed=3,
    )
    # None was forgotten above: all differ from their defaults.
    assert all(getattr(config, field.name) != field.default for field in fields(CompileConfig))


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("batch = 8", "batches", (8,)),
        ("batch = [1, 8]", "batches", (1, 8)),
        ("batches = 8", "batches", (8,)),
        ("slices = 8", "slices", (8,)),
        ("O = 1", "level", 1),
        ("level = 1", "level", 1),
        ('fidelity = "relc<=0.1"', "fidelity", ("relc<=0.1",)),
        ('input-shape = "x=2,3"', "input_shape", ("x=2,3",)),
        ('input_shape = "x=2,3"', "input_shape", ("x=2,3",)),
        ("unsafe-load = true", "unsafe_load", True),
        ("seconds = 2", "seconds", 2.0),
        ("model-args = '{\"depth\": 4}'", "model_args", '{"depth": 4}'),
        ("model-args = {depth = 4}", "model_args", {"depth": 4}),
    ],
)
def test_a_toml_file_takes_the_names_of_flags_and_of_attributes_and_one_value_for_a_list(line, name, value, tmp_path):
    assert CompileConfig.from_toml(toml(tmp_path, line), trusted=True) == CompileConfig(**{name: value})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('seconds = "long"', "`seconds` must be a number, the file has a string"),
        ("seed = 1.5", "`seed` must be a whole number, the file has a number"),
        ("force = 1", "`force` must be true or false, the file has a whole number"),
        ("O = true", "`O` must be a whole number, the file has a boolean"),
        ('batch = "1"', "`batch` must be a whole number or a list of whole numbers, the file has a string"),
        (
            "batches = [1, 2.5]",
            "`batches` must be a whole number or a list of whole numbers, the file has a list, which holds a number",
        ),
        ("model-args = 3", "`model-args` must be a string or a table, the file has a whole number"),
        ("calib = 1979-05-27", "`calib` must be a string, the file has a date or time"),
    ],
)
def test_a_toml_file_is_refused_with_what_was_expected_and_what_it_has(line, message, tmp_path):
    with pytest.raises(OptionError) as caught:
        CompileConfig.from_toml(toml(tmp_path, line))
    assert str(caught.value) == f"in {tmp_path / 'options.toml'}: {message}"


def test_an_empty_toml_file_gives_the_defaults(tmp_path):
    assert CompileConfig.from_toml(toml(tmp_path, "")) == CompileConfig()


@pytest.mark.parametrize(
    "line",
    [
        'colour = "red"',
        "bounds = 1",
        "[batches]\nsmall = 1",
        'seed = "1"',
        "seed = 1.5",
        "seed = true",
        "force = 1",
        'seconds = "long"',
        "out = 3",
        'slices = "8"',
        "slices = 8.0",
        "slices = true",
        'slices = ["8"]',
        "slices = [0.5]",
        "batches = [2.5]",
        "fidelity = 0.1",
        'early_stop = "sometimes"',
        "early_stop = true",
        "model = 3",
        "model_args = 3",
        'inputs = ["x.npz"]',
        "input_shape = 2",
        "out = 1979-05-27",
        "seed = 1\nbatch = 2\nbatches = 2",
        "input_shape = [2, 3]",
        "unsafe_load = 1",
        "fidelity = [0.1]",
        'fidelity = ["relc"]',
        "seed = -1",
    ],
)
def test_a_toml_file_with_an_unknown_key_or_a_wrong_value_is_refused(line, tmp_path):
    with pytest.raises(OptionError) as caught:
        CompileConfig.from_toml(toml(tmp_path, line))
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_an_unknown_key_is_answered_with_the_options_there_are(tmp_path):
    with pytest.raises(OptionError, match="colour") as caught:
        CompileConfig.from_toml(toml(tmp_path, 'colour = "red"'))
    assert all(option.key in caught.value.hint for option in OPTIONS.values())


def test_a_file_that_is_no_toml_is_refused(tmp_path):
    for content in (b"seed: 3\n", b"seed = \n", b"\xff\xfe\x00"):
        (tmp_path / "options.toml").write_bytes(content)
        with pytest.raises(OptionError, match=r"options\.toml"):
            CompileConfig.from_toml(tmp_path / "options.toml")


def test_a_missing_file_of_options_is_refused(tmp_path):
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(OptionError, match="cannot read"):
            CompileConfig.from_toml(path)


@pytest.mark.parametrize("line", ['model = "os:system"', "unsafe-load = true", "unsafe_load = false"])
def test_a_toml_file_makes_no_code_run_unless_it_is_trusted(line, tmp_path):
    with pytest.raises(OptionError, match="makes code run") as caught:
        CompileConfig.from_toml(toml(tmp_path, line))
    assert "--trust-config" in caught.value.hint
    CompileConfig.from_toml(toml(tmp_path, line), trusted=True)


@pytest.mark.parametrize(
    "text",
    [
        "slices = " + "[" * 3000 + "]" * 3000,
        "model-args = " + "{a = " * 200 + "1" + "}" * 200,
        "seed = 1" + "0" * 100_000,
        "seed = 0x1" + "0" * 100_000,
        "model-args = {depth = 0x1" + "0" * 100_000 + "}",
        "# " + "x" * 2**21,
    ],
)
def test_a_toml_file_that_nests_deeply_or_has_long_integers_is_refused(text, tmp_path):
    with pytest.raises(OptionError, match=r"cannot read") as caught:
        CompileConfig.from_toml(toml(tmp_path, text))
    assert len(str(caught.value)) < 1000


def test_what_is_not_a_file_is_never_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path / "pipe.toml", Path("/dev/zero")):
        with pytest.raises(OptionError, match="not a regular file"):
            CompileConfig.from_toml(path)


@pytest.mark.parametrize("operators", ["", "sliced", "exact;truncated", "exact,", "Exact"])
def test_operators_of_no_kind_are_refused(operators):
    with pytest.raises(OptionError, match="--operators cannot be") as caught:
        CompileConfig(operators=operators)
    assert "one-pass, hinges, sorted, amortised, truncated, exact" in caught.value.hint


def test_slices_are_not_asked_for_where_sorting_is_left_out():
    with pytest.raises(OptionError, match="--operators"):
        CompileConfig(slices=(8,), operators="truncated,exact")
    assert CompileConfig(slices=(8,), operators="sorted,exact").slice_counts() == (8,)
