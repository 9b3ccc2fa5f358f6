"""Checkpoints and samples from files: read whole, or refused with a message; never run."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.hostile import BOMB_FORMATS, Bomb, assert_refused

from asapc.errors import AsapcError, CheckpointError, SamplesError
from asapc.loading.model import load_model
from asapc.loading.samples import load_samples
from asapc.models.vit import VisionTransformer

ARGS = {"size": 4, "classes": 3, "width": 8, "depth": 1, "heads": 2, "epsilon": 0.25, "iterations": 20}


def checkpoint(**changes) -> dict:
    content = {
        "format": "asapc.checkpoint/1",
        "model": "asapc.models.vit:VisionTransformer",
        "model_args": ARGS,
        "state_dict": VisionTransformer(**ARGS).state_dict(),
        "calibration": {"inputs": {"images": torch.rand(12, 4, 4)}},
        "held_out": {"inputs": {"images": torch.rand(5, 4, 4)}, "labels": torch.arange(5) % 3},
    }
    return {**content, **changes}


def saved(folder: Path, content: object, name: str = "model.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    content = checkpoint()
    loaded = load_model(saved(tmp_path, content))
    for name, value in loaded.module.state_dict().items():
        assert torch.equal(value, content["state_dict"][name])
    assert not loaded.module.training
    assert loaded.parameters == sum(value.numel() for value in content["state_dict"].values())
    assert len(loaded.sha256) == 64
    assert torch.equal(loaded.calibration.inputs["images"], content["calibration"]["inputs"]["images"])
    assert loaded.calibration.labels is None
    assert torch.equal(loaded.held_out.labels, content["held_out"]["labels"])


def test_a_checkpoint_may_come_without_samples(tmp_path):
    content = checkpoint()
    del content["calibration"], content["held_out"]
    loaded = load_model(saved(tmp_path, content))
    assert (loaded.calibration, loaded.held_out) == (None, None)


def test_the_shipped_checkpoint_loads_with_its_samples(shipped):
    loaded = load_model(shipped)
    assert len(loaded.calibration) >= 64
    assert loaded.held_out.labels is not None
    assert shipped.stat().st_size < 1_000_000


def text(path: Path) -> None:
    path.write_text("these are my weights\n")


def zip_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not a checkpoint")


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, images=np.zeros((3, 4, 4)))


NO_CHECKPOINTS = {
    "folder": Path.mkdir,
    "empty": Path.touch,
    "text": text,
    "zip": zip_archive,
    "npz": npz,
    "bare state_dict": lambda path: torch.save(VisionTransformer(**ARGS).state_dict(), path),
    "list": lambda path: torch.save([1, 2], path),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "later format": lambda path: torch.save(checkpoint(format="asapc.checkpoint/2"), path),
    "format that is no text": lambda path: torch.save(checkpoint(format=torch.zeros(2)), path),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused(name, tmp_path):
    path = tmp_path / "model.pt"
    NO_CHECKPOINTS[name](path)
    assert_refused(CheckpointError, load_model, path)


@pytest.mark.parametrize("read", [load_model, load_samples])
@pytest.mark.parametrize(
    ("path", "reason"),
    [("missing.pt", "no such file"), ("file.pt/below.pt", ""), ("x" * 300 + ".pt", "")],
    ids=["missing", "below a file", "name too long"],
)
def test_a_path_that_cannot_be_opened_is_refused(read, path, reason, tmp_path):
    (tmp_path / "file.pt").write_text("a file")
    assert reason in assert_refused(AsapcError, read, tmp_path / path)


def test_the_reason_tells_an_empty_file_from_a_folder(tmp_path):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    assert "empty" in assert_refused(CheckpointError, load_model, tmp_path / "empty.pt")
    assert "folder" in assert_refused(CheckpointError, load_model, tmp_path / "folder.pt")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999])
def test_a_truncated_checkpoint_is_refused(share, tmp_path):
    path = saved(tmp_path, checkpoint())
    data = path.read_bytes()
    path.write_bytes(data[: max(1, int(share * len(data)))])
    assert_refused(CheckpointError, load_model, path)


@pytest.mark.parametrize("name", BOMB_FORMATS)
def test_a_checkpoint_that_would_run_code_is_read_or_refused_unrun(name, tmp_path):
    path, marker = tmp_path / "model.pt", tmp_path / "marker"
    BOMB_FORMATS[name](path, checkpoint(training=Bomb(marker)))
    if name == "pickle":
        assert_refused(CheckpointError, load_model, path)
    else:
        assert any("mkdir" in note for note in load_model(path).notes)
    assert not marker.exists()
    # The payload is live: a reader that trusts the file does run it.
    pickle.loads(path.read_bytes()) if name == "pickle" else torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_checkpoint_that_would_run_code_is_called_so(tmp_path):
    path = saved(tmp_path, {"training": Bomb(tmp_path / "marker")})
    assert "run code" in assert_refused(CheckpointError, load_model, path)


@pytest.mark.parametrize(
    "factory",
    [
        "os:system",
        "builtins:eval",
        "asapc.loading:load_model",
        "asapc.models.vit",
        "asapc.models.vit:VisionTransformer:extra",
        "asapc.models.vit:nn.Module",
        "asapc.models.vit:torch",
        "asapc.models.vit:Missing",
        "asapc.models.missing:VisionTransformer",
        "asapc.models.vit:",
        "asapc.models.:VisionTransformer",
        "asapc.models..vit:VisionTransformer",
        "",
        None,
        7,
    ],
)
def test_a_checkpoint_that_names_an_unknown_factory_is_refused(factory, tmp_path):
    assert_refused(CheckpointError, load_model, saved(tmp_path, checkpoint(model=factory)), named=str(factory))


def test_a_name_in_a_checkpoint_calls_no_function_of_the_models(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("asapc.models.vit.sinkhorn", lambda **arguments: calls.append(arguments), raising=False)
    path = saved(tmp_path, checkpoint(model="asapc.models.vit:sinkhorn", model_args={"iterations": 1}))
    assert_refused(CheckpointError, load_model, path, named="sinkhorn")
    assert calls == []


@pytest.mark.parametrize("args", [None, [4], {"width": 8, "unknown": 1}, {"width": "8"}, {"width": -8}, {1: 2}])
def test_arguments_that_the_model_does_not_take_are_refused(args, tmp_path):
    assert_refused(CheckpointError, load_model, saved(tmp_path, checkpoint(model_args=args)), named="")


def changed(**changes) -> dict:
    """The model's weights, with some set to something else; None removes one."""
    weights = VisionTransformer(**ARGS).state_dict() | {name.replace("__", "."): v for name, v in changes.items()}
    return {name: value for name, value in weights.items() if value is not None}


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        (changed(head__bias=None), "head.bias"),
        (changed(surplus=torch.zeros(1)), "surplus"),
        (changed(head__bias=torch.zeros(4)), "head.bias"),
        (changed(head__bias=torch.zeros(3, 1)), "head.bias"),
        (changed(head__bias=torch.tensor([0.0, float("nan"), 0.0])), "head.bias"),
        (changed(head__bias=torch.tensor([0.0, float("inf"), 0.0])), "head.bias"),
        (changed(head__bias="zeros"), "head.bias"),
        (changed(head__bias=[0.0, 0.0, 0.0]), "head.bias"),
        (changed(head__bias=torch.zeros(3, dtype=torch.complex64)), "head.bias"),
        ({**changed(surplus=torch.zeros(1)), 1: torch.zeros(1)}, "surplus"),
        ({}, "head.bias"),
        (None, "weights"),
        ([torch.zeros(3)], "weights"),
    ],
    ids=[
        "missing",
        "extra",
        "wrong size",
        "wrong rank",
        "nan",
        "infinite",
        "string",
        "list",
        "complex",
        "key that is no string",
        "none at all",
        "absent",
        "no mapping",
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, named, tmp_path):
    message = assert_refused(CheckpointError, load_model, saved(tmp_path, checkpoint(state_dict=weights)))
    assert named in message or "more" in message


@pytest.mark.parametrize("args", [{"width": 2**20}, {"size": 2**15}, {"depth": 2**40}, {"width": 2**70}])
def test_arguments_of_a_model_that_is_too_large_are_refused_before_it_is_built(args, tmp_path):
    path = saved(tmp_path, checkpoint(model_args={**ARGS, **args}))
    assert_refused(CheckpointError, load_model, path)


@pytest.mark.parametrize("key", ["calibration", "held_out"])
@pytest.mark.parametrize("samples", [{}, {"inputs": {}}, {"inputs": {"images": [1]}}, torch.zeros(3)])
def test_a_checkpoint_with_unusable_samples_is_refused(key, samples, tmp_path):
    assert_refused(CheckpointError, load_model, saved(tmp_path, checkpoint(**{key: samples})))


def arrays() -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(0).random((6, 4, 4), dtype=np.float32), "labels": np.arange(6)}


def saved_arrays(folder: Path, suffix: str, **values) -> Path:
    path = folder / f"samples{suffix}"
    if suffix == ".npz":
        np.savez(path, **values)
    else:
        torch.save({name: torch.from_numpy(np.asarray(v)) for name, v in values.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_samples_come_back_as_they_were_saved(suffix, tmp_path):
    samples = load_samples(saved_arrays(tmp_path, suffix, **arrays()))
    assert list(samples.inputs) == ["images"]
    assert len(samples) == 6
    assert np.array_equal(samples.inputs["images"].numpy(), arrays()["images"])
    assert samples.inputs["images"].dtype == torch.float32
    assert samples.labels.tolist() == list(range(6))


def test_labels_are_optional(tmp_path):
    assert load_samples(saved_arrays(tmp_path, ".npz", images=arrays()["images"])).labels is None


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
@pytest.mark.parametrize(
    "values",
    [
        {"images": np.full((6, 4, 4), np.nan)},
        {"images": np.full((6, 4, 4), np.inf)},
        {"images": np.zeros((6, 4, 4)), "mask": np.zeros((5, 4))},
        {"images": np.zeros((6, 4, 4)), "labels": np.zeros(5, dtype=int)},
        {"images": np.float32(1.0)},
        {"images": np.zeros((6, 4, 4)), "labels": np.int64(1)},
        {"labels": np.zeros(6, dtype=int)},
        {},
    ],
    ids=["nan", "infinite", "lengths differ", "fewer labels", "scalar", "scalar labels", "labels alone", "nothing"],
)
def test_arrays_that_cannot_be_samples_are_refused(values, suffix, tmp_path):
    assert_refused(SamplesError, load_samples, saved_arrays(tmp_path, suffix, **values))


@pytest.mark.parametrize("labels", [np.eye(6), np.full(6, 0.5)], ids=["one-hot", "fractions"])
def test_labels_that_are_no_class_indices_are_refused(labels, tmp_path):
    path = saved_arrays(tmp_path, ".npz", images=arrays()["images"], labels=labels)
    assert "labels" in assert_refused(SamplesError, load_samples, path)


@pytest.mark.parametrize("name", ["samples.csv", "samples.txt", "samples"])
def test_samples_of_another_suffix_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"1,2,3")
    assert ".npz" in assert_refused(SamplesError, load_samples, tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], "text", torch.tensor(3.0), {"images": "text"}, {"images": None}])
def test_a_pt_file_that_holds_no_arrays_by_name_is_refused(content, tmp_path):
    assert_refused(SamplesError, load_samples, saved(tmp_path, content, "samples.pt"))


def test_text_arrays_are_refused(tmp_path):
    assert_refused(SamplesError, load_samples, saved_arrays(tmp_path, ".npz", images=np.array(["a", "b"])))


def test_one_array_under_the_name_of_an_npz_is_refused(tmp_path):
    path = tmp_path / "samples.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros((6, 4, 4)))
    assert_refused(SamplesError, load_samples, path)


def test_an_npz_with_pickled_objects_is_refused_unrun(tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "samples.npz"
    np.savez(path, images=np.array([Bomb(marker)], dtype=object))
    assert_refused(SamplesError, load_samples, path)
    assert not marker.exists()
    np.load(path, allow_pickle=True)["images"]  # the payload is live
    assert marker.exists()


@pytest.mark.parametrize("name", BOMB_FORMATS)
@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_samples_that_would_run_code_are_refused_unrun(name, suffix, tmp_path):
    path, marker = tmp_path / f"samples{suffix}", tmp_path / "marker"
    BOMB_FORMATS[name](path, {"images": Bomb(marker)})
    assert_refused(SamplesError, load_samples, path)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.75, 0.99])
def test_truncated_samples_are_refused(suffix, share, tmp_path):
    path = saved_arrays(tmp_path, suffix, **arrays())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert_refused(SamplesError, load_samples, path)


def test_a_damaged_byte_in_an_npz_is_an_error_of_the_samples_or_none(tmp_path):
    # Wherever the damage lies, zlib, zipfile and numpy each complain in their own way.
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays())
    whole = buffer.getvalue()
    path = tmp_path / "samples.npz"
    refused = 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            load_samples(path)
        except SamplesError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("save", ["samples.pt", "samples.npz"])
def test_samples_that_would_run_code_are_told_how_to_save_samples(save, tmp_path):
    path = tmp_path / save
    if path.suffix == ".npz":
        np.savez(path, x=np.array([{}], dtype=object))
    else:
        torch.save({"x": Bomb(tmp_path / "marker")}, path)
    with pytest.raises(SamplesError) as caught:
        load_samples(path)
    assert "numpy.savez" in caught.value.hint
    assert "state_dict" not in caught.value.hint
