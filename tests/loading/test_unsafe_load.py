"""Files with Python objects: run as programs where the user says so, and nowhere else."""

import sys
from types import ModuleType

import pytest
import torch
from helpers.hostile import Bomb, Tiny, assert_refused
from helpers.weights import TINY, same, saved, weights
from torch import nn

from asapc.config import CompileConfig
from asapc.errors import CheckpointError
from asapc.loading.model import load_model


def test_a_pickled_module_is_read_only_where_the_user_says_so(tmp_path):
    expected = Tiny()
    for content, place in ((expected, ""), ({"model": expected}, "'model'")):
        path = saved(tmp_path / "m.pt", content)
        with pytest.raises(CheckpointError, match="run code") as caught:
            load_model(path)
        assert "--unsafe-load" in caught.value.hint
        loaded = load_model(path, CompileConfig(unsafe_load=True))
        assert same(loaded, expected.state_dict())
        assert "code in the file was run" in loaded.notes
        assert place in loaded.notes[-1]


def test_python_objects_beside_the_weights_are_run_only_where_the_user_says_so(tmp_path):
    marker = tmp_path / "marker"
    expected = weights()
    path = saved(tmp_path / "m.pt", {"args": Bomb(marker), "model": expected})
    assert same(load_model(path, TINY), expected)
    assert not marker.exists()
    assert same(load_model(path, CompileConfig(model="helpers.hostile:Tiny", unsafe_load=True)), expected)
    assert marker.exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda module: setattr(module, "Kept", None) or delattr(module, "Kept"), "cannot be imported here"),
        (lambda module: sys.modules.pop(module.__name__), "No module named 'moved'"),
        (lambda module: setattr(module.Kept, "__setstate__", lambda *_: 1 / 0), "raises ZeroDivisionError"),
    ],
    ids=["class", "module", "raises"],
)
def test_a_program_that_fails_is_not_called_damaged(change, why, tmp_path, monkeypatch):
    module = ModuleType("moved")
    monkeypatch.setitem(sys.modules, "moved", module)
    module.Kept = type("Kept", (nn.Linear,), {"__module__": "moved"})
    path = saved(tmp_path / "m.pt", module.Kept(2, 2))
    change(module)
    message = assert_refused(CheckpointError, lambda p: load_model(p, CompileConfig(unsafe_load=True)), path)
    assert why in message
    assert "damaged" not in message


def test_the_numbers_of_a_pickled_module_are_looked_at_as_those_of_weights(tmp_path):
    read = CompileConfig(unsafe_load=True)
    masked, spoilt = Tiny(), Tiny()
    masked.mask.fill_(-torch.inf)
    assert load_model(saved(tmp_path / "m.pt", masked), read).module.mask.isinf().all()
    spoilt.head.bias.data[0] = torch.inf
    assert "head.bias" in assert_refused(
        CheckpointError, lambda p: load_model(p, read), saved(tmp_path / "m.pt", spoilt)
    )
    masked.mask[0, 0] = torch.nan
    assert "mask" in assert_refused(CheckpointError, lambda p: load_model(p, read), saved(tmp_path / "m.pt", masked))


def test_unsafe_load_runs_nothing_where_nothing_needs_it(shipped):
    assert load_model(shipped, CompileConfig(unsafe_load=True)).notes == ()


@pytest.mark.parametrize("content", [b"\x80\x02N.", b"\x80\x04N.", b"\x80", b"PK\x03\x04", b"junk"])
def test_damage_stays_damage_with_unsafe_load(content, tmp_path):
    (tmp_path / "m.pt").write_bytes(content)
    assert_refused(CheckpointError, lambda path: load_model(path, CompileConfig(unsafe_load=True)), tmp_path / "m.pt")
