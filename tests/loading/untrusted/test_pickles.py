"""Pickles of tensors only, which claim what is not there."""

import argparse
import operator
import os
import pickle
import pickletools
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import hostile
from helpers.hostile import READERS, assert_refused, hint_of, rezip, torch_file

from asapc.config import CompileConfig
from asapc.errors import AsapcError, CheckpointError
from asapc.loading.model import load_model
from asapc.loading.samples import load_samples
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.tensors import read_torch_parts


def with_pickle(folder: Path, code: bytes) -> Path:
    return rezip(torch_file(folder), folder / "made.pt", {"data.pkl": b"\x80\x02" + code + b"."})


def tensor_code(storage: bytes = b"K\x0c", size: bytes = b"K\x03K\x04\x86", stride: bytes = b"K\x04K\x01\x86") -> bytes:
    """Opcodes for {"x": a tensor of the one storage of `torch_file`}, 12 numbers."""
    return (
        b"}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + storage + b"tQK\x00" + size + stride + b"\x89"
        b"ccollections\nOrderedDict\n)RtRs"
    )


def long(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def test_the_pickle_of_these_tests_is_a_good_one(tmp_path):
    assert load_samples(with_pickle(tmp_path, tensor_code())).inputs["x"].shape == (3, 4)


@pytest.mark.parametrize(
    "code",
    [
        tensor_code(storage=long(2**40)),
        tensor_code(storage=long(2**62)),
        tensor_code(storage=long(-5)),
        tensor_code(storage=b"K\x00"),
        tensor_code(size=long(2**40) + b"\x85", stride=b"K\x00\x85"),
        tensor_code(size=long(2**31) + b"K\x02\x86", stride=b"K\x00K\x00\x86"),
        tensor_code(size=long(2**40) + b"\x85", stride=b"K\x01\x85"),
        tensor_code(size=long(2**62) + long(2**62) + b"\x86", stride=b"K\x00K\x00\x86"),
        tensor_code(size=long(-3) + b"\x85", stride=b"K\x01\x85"),
        tensor_code(stride=b"K\x04" + long(-1) + b"\x86"),
        tensor_code(stride=b"K\x04" + long(2**62) + b"\x86"),
        tensor_code(size=b"K\x0d\x85", stride=b"K\x01\x85"),
        b"}X\x01\x00\x00\x00xc__builtin__\nbytearray\n" + long(2**36) + b"\x85Rs",
        b"}X\x01\x00\x00\x00xctorch\nFloatTensor\n" + long(2**40) + b"\x85Rs",
        b"}X\x01\x00\x00\x00xctorch.storage\nUntypedStorage\n" + long(2**44) + b"\x85Rs",
        b"}" + b"X\x01\x00\x00\x00x" + b"K\x01",  # ends with a stack that is not empty
        b"s",
        b"\x00",
    ],
)
@pytest.mark.parametrize("read", READERS.values())
def test_claims_of_a_pickle_are_refused(read, code, tmp_path):
    assert_refused(AsapcError, read, with_pickle(tmp_path, code))


NESTED = {
    "tuple in tuple": b")" + b"\x85" * 2_000_000,
    "tuple of itself twice over": b")" + b"q\x00h\x00h\x00\x86" * 200,
    "tuple of itself many times over": b")" + (b"q\x00(" + b"h\x00" * 100 + b"t") * 20,
    "list in list": b"]" * 100_000 + b"a" * 99_999,
    "list in itself": b"]q\x00h\x00a",
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("as_key", [True, False])
@pytest.mark.parametrize("read", READERS.values())
def test_nesting_is_refused_before_it_exhausts_anything(read, name, as_key, tmp_path):
    # As the key of a dict a value is hashed.
    code = b"}" + NESTED[name] + b"K\x01s" if as_key else b"}K\x01" + NESTED[name] + b"s"
    assert_refused(AsapcError, read, with_pickle(tmp_path, code))


def test_containers_cannot_bring_attributes_along(tmp_path):
    class Shadowed(OrderedDict):
        def __reduce__(self):
            return OrderedDict, (), {"keys": 1, "items": 2, "get": 3, "__class__": 4}, None, iter(self.items())

    path = tmp_path / "shadowed.pt"
    torch.save(Shadowed(x=torch.zeros(3, 4)), path)
    assert any(op.name == "BUILD" for op, _, _ in pickletools.genops(zipfile.ZipFile(path).read("shadowed/data.pkl")))
    assert load_samples(path).inputs["x"].shape == (3, 4)


def test_tensors_may_share_memory_and_be_expanded(tmp_path):
    weight = torch.rand(50, 4)
    torch.save({"a": weight, "b": weight, "c": weight[:1].expand(50, 4), "labels": torch.arange(50)}, tmp_path / "s.pt")
    samples = load_samples(tmp_path / "s.pt")
    assert torch.equal(samples.inputs["a"], samples.inputs["b"])


def test_numbers_texts_and_bytes_beside_the_tensors_are_fine(tmp_path):
    content = {"x": torch.zeros(3, 4, dtype=torch.bfloat16), "z": torch.nn.Parameter(torch.zeros(3))}
    for new in (True, False):  # torch itself writes, but does not read, its newest dtypes in the old format
        newest = {"y": torch.zeros(3, dtype=torch.uint16), "f": torch.zeros(3).to(torch.float8_e5m2)} if new else {}
        torch.save(content | newest, tmp_path / "s.pt", _use_new_zipfile_serialization=new)
        assert load_samples(tmp_path / "s.pt").inputs["x"].dtype == torch.bfloat16
    other = {"lr": 0.1, "name": "run", "best": (1, None, True), "big": 2**80, "raw": b"\xff", "kinds": {1, 2}}
    torch.save({**other, "dtype": torch.float16, "shape": torch.Size([2]), "c": 1j}, tmp_path / "m.pt")
    assert "--model" in hint_of(load_model, tmp_path / "m.pt")


class Settings:
    """A class of the user's own, as trainers store them."""

    def __init__(self) -> None:
        self.rate = 0.1


def beside() -> dict[str, object]:
    """What trainers keep beside the weights."""
    return {
        "best": np.float64(0.5),
        "losses": np.zeros(3),
        "args": argparse.Namespace(width=4),
        "seen": defaultdict(list, {"a": [1]}),
        "folder": Path("runs"),
        "optimizer": torch.optim.Adam,
        "settings": Settings(),
        "reduce": operator.methodcaller("mean"),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False])
def test_tensors_are_read_whatever_lies_beside_them_and_nothing_is_run(protocol, new, tmp_path):
    weights = hostile.Tiny().state_dict()
    content = {"state_dict": weights, "marker": hostile.Bomb(tmp_path / "marker"), **beside()}
    path = tmp_path / "trained.pt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    loaded = load_model(path, CompileConfig(model="helpers.hostile:Tiny"))
    assert all(torch.equal(value, weights[name]) for name, value in loaded.module.state_dict().items())
    assert any("not read, for that would run code: argparse.Namespace and 7 more" in note for note in loaded.notes)
    assert not (tmp_path / "marker").exists()


def test_what_was_not_read_is_named_where_the_weights_do_not_fit(tmp_path):
    torch.save({"model": Settings(), "optimizer": {"step": torch.zeros(1)}}, tmp_path / "trained.pt")
    hint = hint_of(lambda path: load_model(path, CompileConfig(model="helpers.hostile:Tiny")), tmp_path / "trained.pt")
    assert "Settings nothing was read" in hint
    assert "Settings nothing was read" in hint_of(load_model, tmp_path / "trained.pt")


def test_samples_with_other_objects_are_refused(tmp_path):
    torch.save({"x": torch.zeros(3, 4), "args": argparse.Namespace()}, tmp_path / "s.pt")
    assert "argparse.Namespace" in assert_refused(AsapcError, load_samples, tmp_path / "s.pt")


class Marked(torch.Tensor):
    """A subclass, as libraries have for images and boxes."""


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_parameters_with_attributes_subclasses_and_quantized_tensors_are_tensors(tmp_path):
    marked = torch.nn.Parameter(torch.ones(3))
    marked.no_decay = True
    packed = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    channels = torch.quantize_per_channel(torch.ones(3, 2), torch.ones(3), torch.zeros(3), 0, torch.quint8)
    content = {"w": marked, "s": torch.ones(3).as_subclass(Marked), "q": packed, "c": channels}
    torch.save(content, tmp_path / "w.pt")
    with (tmp_path / "w.pt").open("rb") as file:
        read, unread = read_torch_parts(file, Source.at(tmp_path / "w.pt", CheckpointError))
    assert unread == ()
    assert type(read["w"]) in (torch.nn.Parameter, torch.Tensor)
    assert type(read["s"]) is torch.Tensor
    assert torch.equal(read["s"], torch.ones(3))
    assert torch.equal(read["q"], packed)
    assert torch.equal(read["c"], channels)


@pytest.mark.parametrize("target", [b"ccollections\nCounter\n", b"ctorch._utils\n_rebuild_tensor_v2\n"])
@pytest.mark.parametrize("twice", [b"", b"2", b"q\x000h\x00", b"\x940h\x00"])
def test_what_a_pickle_names_stays_as_it_is(target, twice, tmp_path):
    # A state with slots sets attributes; of a class or function the whole process would see them.
    state = b"N}X\x0b\x00\x00\x00evil_markerK\x01s\x86b"
    path = with_pickle(tmp_path, b"}X\x01\x00\x00\x00x" + target + twice + state + b"s")
    assert_refused(AsapcError, load_model, path)
    assert not hasattr(Counter, "evil_marker")
    assert not hasattr(torch._utils._rebuild_tensor_v2, "evil_marker")


def test_room_is_not_made_for_numbers_that_were_never_given(tmp_path):
    # Python's reader makes room for all numbers below: 2^31 of them are 16 GB.
    assert_refused(AsapcError, load_model, with_pickle(tmp_path, b"}r\x00\x00\x00\x7f"))
    assert_refused(AsapcError, load_model, with_pickle(tmp_path, b"}p2000000000\n"))


def test_files_are_read_where_the_environment_asks_for_torchs_own_reader(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    assert load_samples(torch_file(tmp_path)).inputs["x"].shape == (3, 4)
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
