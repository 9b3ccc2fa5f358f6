"""Zip archives that claim what they do not hold, or lead out of themselves."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from helpers.damage import AMBIGUOUS
from helpers.hostile import READERS, assert_refused, export, torch_file

from asapc.errors import AsapcError, CheckpointError, SamplesError
from asapc.loading.model import load_model
from asapc.loading.samples import load_samples


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


@pytest.mark.parametrize("change", AMBIGUOUS)
def test_what_two_readers_could_read_in_two_ways_is_refused(change, tmp_path):
    plain, long = tmp_path / "plain.pt", tmp_path / "long.npz"
    with zipfile.ZipFile(torch_file(tmp_path)) as source, zipfile.ZipFile(plain, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    np.savez(long, x=np.zeros((3, 4), dtype=np.float32))  # its headers have their sizes in eight bytes
    for whole in (plain, tmp_path / "whole.pt", long):
        assert load_samples(whole).inputs["x"].shape == (3, 4)
        path = tmp_path / f"two{whole.suffix}"
        path.write_bytes(change(whole.read_bytes()))
        assert_refused(AsapcError, load_model, path)
        assert_refused(AsapcError, load_samples, path)


def test_an_archive_with_the_records_of_large_ones_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 0)
    np.savez(tmp_path / "large.npz", x=np.zeros((3, 4), dtype=np.float32), labels=np.arange(3))
    assert b"PK\x06\x06" in (tmp_path / "large.npz").read_bytes()
    assert load_samples(tmp_path / "large.npz").inputs["x"].shape == (3, 4)


def test_an_archive_that_was_written_as_a_stream_is_read(tmp_path):
    class Stream(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            parts.append(bytes(data))
            return len(data)

    parts: list[bytes] = []
    with zipfile.ZipFile(Stream(), "w") as archive, archive.open("x.npy", "w") as member:
        np.lib.format.write_array(member, np.zeros((3, 4), dtype=np.float32))
    (tmp_path / "stream.npz").write_bytes(b"".join(parts))
    assert load_samples(tmp_path / "stream.npz").inputs["x"].shape == (3, 4)
