"""Hostile files: refused in one line before they run anything or take memory, whatever reads them."""

import json
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.hostile import BOMB_FORMATS, Bomb, assert_refused, export, hint_of, rezip
from safetensors.torch import save_file

from asapc.config import CompileConfig
from asapc.errors import AsapcError, CheckpointError, SamplesError
from asapc.loading.model import load_model
from asapc.loading.samples import load_samples

READERS = {".pt": load_samples, ".pth": load_model, ".bin": load_model}


def read_inputs(path: Path) -> object:
    """The file as example inputs of a model whose own file is never reached."""
    return load_model(path, CompileConfig(inputs=path))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ".pt2", ".onnx", ".npz", ""])
@pytest.mark.parametrize("name", BOMB_FORMATS)
@pytest.mark.parametrize("read", [load_model, load_samples, read_inputs])
def test_no_reader_runs_a_pickle_under_any_suffix(read, name, suffix, tmp_path):
    path, marker = tmp_path / f"file{suffix}", tmp_path / "marker"
    BOMB_FORMATS[name](path, {"x": Bomb(marker), "weight": torch.zeros(2)})
    assert_refused(AsapcError, read, path)
    assert not marker.exists()


@pytest.mark.parametrize("read", [load_model, load_samples, read_inputs])
def test_an_array_of_objects_is_not_unpickled(read, tmp_path):
    path, marker = tmp_path / "file.npz", tmp_path / "marker"
    np.savez(path, x=np.array([Bomb(marker)], dtype=object))
    assert_refused(AsapcError, read, path, named="file.npz")
    assert not marker.exists()


@pytest.mark.parametrize("read", [load_model, load_samples])
def test_one_array_in_a_file_of_numpy_is_not_unpickled(read, tmp_path):
    path, marker = tmp_path / "file.npy", tmp_path / "marker"
    np.save(path, np.array([Bomb(marker)], dtype=object))
    assert_refused(AsapcError, read, path)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pt2", ".npz"])
@pytest.mark.parametrize("read", [load_model, load_samples])
def test_pipes_devices_and_folders_are_not_read(read, suffix, tmp_path):
    pipe, folder, zero = (tmp_path / f"{name}{suffix}" for name in ("pipe", "folder", "zero"))
    os.mkfifo(pipe)
    folder.mkdir()
    zero.symlink_to("/dev/zero")
    for path in (pipe, folder, zero):
        assert_refused(AsapcError, read, path)


def test_a_link_to_a_file_is_followed(shipped, tmp_path):
    (tmp_path / "link.pt").symlink_to(shipped)
    assert load_model(tmp_path / "link.pt").parameters == load_model(shipped).parameters


def test_names_from_a_file_cannot_break_the_line_or_steer_the_terminal(tmp_path):
    path = tmp_path / "line\nbreak.pt"
    path.write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert str(caught.value).isprintable()


# Zip archives.


def torch_file(folder: Path, name: str = "whole.pt") -> Path:
    torch.save({"x": torch.zeros(3, 4)}, folder / name)
    return folder / name


@pytest.mark.parametrize("read", READERS.values())
def test_a_compressed_member_is_refused(read, tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(torch_file(tmp_path)) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name) if not name.endswith("data/0") else bytes(2**24))
    assert "compressed" in assert_refused(AsapcError, read, path)


def test_a_member_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    path = torch_file(tmp_path)
    data = path.read_bytes()
    entry = data.rindex(b"data/0") - 46 - len("whole/")  # of the central directory
    assert data[entry : entry + 4] == b"PK\x01\x02"
    path.write_bytes(data[: entry + 20] + struct.pack("<II", 2**31, 2**31) + data[entry + 28 :])
    assert "claim" in assert_refused(CheckpointError, load_model, path)


def test_an_array_file_that_unpacks_to_far_more_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (2**29,)})
        for _ in range(2**29 // 2**24):
            member.write(bytes(2**24))
    assert "claim" in assert_refused(SamplesError, load_samples, path)


def test_arrays_that_compress_well_are_read(tmp_path):
    np.savez_compressed(tmp_path / "zeros.npz", x=np.zeros((1000, 1000), dtype=np.float32))
    assert load_samples(tmp_path / "zeros.npz").inputs["x"].shape == (1000, 1000)


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20), (0,), (5,), (-1,), (2**62, 2**62)])
def test_an_array_header_that_claims_another_size_is_refused(shape, tmp_path):
    path = tmp_path / "claim.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": shape})
        member.write(bytes(16))
    assert_refused(SamplesError, load_samples, path)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "c:/evil", "..\\evil"])
def test_names_that_lead_out_of_the_archive_are_refused(name, tmp_path):
    with zipfile.ZipFile(torch_file(tmp_path), "a") as archive:
        archive.writestr(name, b"x")
    assert "leads out" in assert_refused(CheckpointError, load_model, tmp_path / "whole.pt")


@pytest.mark.parametrize("make", [torch_file, lambda folder: export(folder / "whole.pt2")])
def test_links_in_an_archive_are_refused(make, tmp_path):
    path = make(tmp_path)
    link = zipfile.ZipInfo(f"{path.stem}/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert "leads out" in assert_refused(CheckpointError, load_model, path)


@pytest.mark.parametrize("name", ["whole/data.pkl", "whole/DATA.PKL"])
def test_two_members_of_one_name_are_refused(name, tmp_path):
    path = torch_file(tmp_path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns() if name.islower() else pytest.MonkeyPatch.context():
        archive.writestr(name, pickle.dumps({}))
    message = f"cannot read {path}: two members of the archive have the same name"
    assert assert_refused(CheckpointError, load_model, path) == message


def test_a_second_pickle_beside_the_first_is_refused(tmp_path):
    with zipfile.ZipFile(torch_file(tmp_path), "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps({}))
    assert_refused(CheckpointError, load_model, tmp_path / "whole.pt")


def test_torchscript_is_refused_with_the_way_out(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="TorchScript") as caught:
        load_model(tmp_path / "script.pt")
    assert "--model" in caught.value.hint


def test_what_is_called_onnx_and_is_not_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a")
    assert "damaged" in assert_refused(CheckpointError, load_model, tmp_path / "model.onnx")


# Pickles of tensors only, which claim what is not there.


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


# Safetensors.


def safetensors(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (entry(0, 2**40, [2**38]), None),
        (entry(0, 16, [2**62, 4]), None),
        (entry(0, 16, [5]), None),
        (entry(8, 4, [1]), None),
        (entry(0, 16, [-4]), None),
        (entry(0, 16, [4], "F99"), None),
        (entry(0, 16, [4]), 2**63),
        (entry(0, 16, [4]), 2**31),
        (entry(0, 16, [4]), 0),
        ([], None),
        (b"[" * 100_000, None),
        (b'{"a":' * 100_000, None),
        (b"\xff\xfe", None),
    ],
)
def test_headers_of_safetensors_that_do_not_fit_the_file_are_refused(header, length, tmp_path):
    path = safetensors(tmp_path / "w.safetensors", header, bytes(16), length)
    assert_refused(CheckpointError, load_model, path)


def test_a_good_file_of_safetensors_is_asked_for_its_model(tmp_path):
    save_file({"x": torch.zeros(4)}, tmp_path / "w.safetensors")
    assert "model" in assert_refused(CheckpointError, load_model, tmp_path / "w.safetensors")
