"""Pickles of tensors only, which claim what is not there."""

import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers.hostile import READERS, assert_refused, hint_of, rezip, torch_file

from asapc.errors import AsapcError
from asapc.loading.model import load_model
from asapc.loading.samples import load_samples


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
