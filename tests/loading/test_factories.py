"""The model that the user names with `--model`: built from code that is there, or refused in one line."""

import json
from pathlib import Path

import pytest
from helpers.hostile import assert_refused, forget
from torch import nn

from asapc.errors import OptionError
from asapc.loading.factories import build_model


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the working directory."""
    monkeypatch.chdir(tmp_path)
    written = []

    def write(code: str, name: str = "my_model") -> None:
        (tmp_path / f"{name}.py").write_text(f"import sys, torch\nfrom torch import nn\n{code}\n")
        written.append(name)

    yield write
    for name in written:
        forget(name)


def test_a_model_of_the_working_directory_is_built_with_its_arguments(module, tmp_path):
    module(
        "def build(depth, *, width=1):\n    return nn.ModuleDict({str(i): nn.Linear(width, 1) for i in range(depth)})"
    )
    (tmp_path / "args.json").write_text('{"depth": 3, "width": 2}')
    for args in ('{"depth": 3, "width": 2}', "args.json", {"depth": 3, "width": 2}):
        assert sum(p.numel() for p in build_model("my_model:build", args).parameters()) == 9


def test_a_class_inside_a_class_is_found(module):
    module("class A:\n    class B(nn.Linear):\n        def __init__(self):\n            super().__init__(1, 1)")
    assert isinstance(build_model("my_model:A.B", None), nn.Linear)


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [
        ("my_model", "", "my_model"),
        ("my_model:", "", "my_model:"),
        (":build", "", ":build"),
        ("my model:build", "", "my model"),
        ("../my_model:build", "", "../my_model"),
        ("no_such_module:build", "", "no module"),
        ("my_model:build", "", "has no build"),
        ("my_model:x.y", "x = 1", "has no x.y"),
        ("my_model:build", "build = 3", "cannot be called"),
        ("my_model:build", "build = lambda: 3", "int"),
        ("my_model:build", "build = lambda: nn.Linear", "not a torch.nn.Module"),
        ("my_model:build", "build = lambda depth: 3", "depth"),
        ("my_model:build", "def build():\n    raise RuntimeError('first\\nsecond')", "RuntimeError: first"),
        ("my_model:build", "def build():\n    raise KeyError", "KeyError"),
        ("my_model:build", "def build():\n    sys.exit(3)", "SystemExit"),
        ("my_model:build", "def build():\n    raise KeyError(3)", "my_model.py:"),
        ("my_model:build", "build = lambda: nn.LazyLinear(3)", "lazy"),
        ("my_model:build", "build = lambda: nn.Sequential(torch.jit.script(nn.ReLU()))", "TorchScript, which"),
        ("my_model:build", "import no_such_module", "no_such_module"),
        ("my_model:build", "1 +", "SyntaxError"),
        ("my_model:build", "sys.exit()", "SystemExit"),
        ("my_model:build", "raise ValueError('bad')", "bad"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_in_one_line(name, code, word, module):
    module(code)
    assert_refused(OptionError, lambda name: build_model(name, None), name, named=word)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ("missing.json", "no such file"),
        (".", "folder"),
        ("/dev/zero", "regular"),
        ("binary.json", "binary.json is not JSON"),
        ("long.json", "too long"),
        ("{", "JSON"[:0]),
        ("[1]", "the model's arguments '[1]' are not a JSON object"),
        ('"text"', """the model's arguments '"text"' are not a JSON object"""),
        ('{"a":' * 100_000, "nests too deeply"),
        ("deep.json", "nests too deeply"),
        ("", ""),
    ],
)
def test_arguments_that_are_no_json_object_are_refused(args, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("binary.json").write_bytes(b"\xff\xfe\x00")
    Path("long.json").write_text(json.dumps({"a": "x" * 2**21}))
    Path("deep.json").write_text("[" * 100_000)
    assert_refused(OptionError, lambda args: build_model("helpers.hostile:Tiny", args), args, named=word)
