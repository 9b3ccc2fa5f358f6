"""Folders that were tampered with are refused with the name of the file, and nothing in them is waited for."""

import json
import os
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers.command import assert_user_error, run, write_checkpoint
from helpers.damage import change_json
from helpers.folders import ODD_VALUES, relist, tamper
from helpers.hostile import assert_refused

from asapc.commands.compile import compile_model
from asapc.commands.verify import verify_model
from asapc.config import CompileConfig
from asapc.errors import CheckpointError
from asapc.loading.folder import read_folder
from asapc.loading.manifest import check_files


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    path = write_checkpoint(folder / "model.pt", iterations=2)
    options = {"level": 1, "fidelity": ("agreement>=0",), "batches": (1,), "seconds": 0.05, "target": "onnx"}
    compile_model(path, CompileConfig(out=folder / "out", **options))
    np.savez(folder / "data.npz", images=np.zeros((3, 4, 4), dtype=np.float32))
    return folder / "out"


def replaced(name: str):
    """Replace a file by a pipe, a device or a link, or put one beside it."""
    return (
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        lambda path: (path.rename(path.parent.parent / name), path.symlink_to(path.parent.parent / name)),
        lambda path: (path.unlink(), path.mkdir()),
    )


@pytest.mark.parametrize("name", ["manifest.json", "report.json", "model.onnx", "operator.safetensors"])
def test_only_regular_files_are_read(name, compiled, tmp_path):
    for number, replace in enumerate(replaced(name)):
        folder = tamper(compiled, tmp_path / str(number) / "out", "report.json", lambda report: None)
        replace(folder / name)
        assert "regular" in assert_refused(CheckpointError, read_folder, folder, named=name)


@pytest.mark.parametrize("name", ["/dev/zero", "../../etc/passwd", "..", "sub/file", "", "manifest.json"])
def test_a_manifest_that_names_what_is_outside_is_refused(name, compiled, tmp_path):
    facts = {"sha256": "0" * 64, "bytes": 1}
    folder = tamper(compiled, tmp_path / "out", "manifest.json", lambda content: content["files"].update({name: facts}))
    assert_refused(CheckpointError, read_folder, folder, named="manifest.json")


def test_a_manifest_lists_the_files_and_no_others(compiled, tmp_path):
    folder = tamper(compiled, tmp_path / "more", "report.json", lambda report: None)
    (folder / "extra.txt").write_text("x")
    assert_refused(CheckpointError, read_folder, folder, named="extra.txt")
    for name in ("model.onnx", "report.json"):
        folder = tamper(
            compiled, tmp_path / name, "manifest.json", lambda content, name=name: content["files"].pop(name) and None
        )
        assert_refused(CheckpointError, read_folder, folder, named="manifest.json")
    folder = tamper(compiled, tmp_path / "nothing", "manifest.json", lambda content: content["files"].clear())
    assert_refused(CheckpointError, read_folder, folder, named="manifest.json")


def test_a_folder_without_its_manifest_is_still_known_as_what_it_was(compiled, tmp_path):
    folder = tamper(compiled, tmp_path / "out", "report.json", lambda report: None)
    (folder / "manifest.json").unlink()
    message, hint = assert_user_error(run("inspect", folder))
    assert "is incomplete" in message
    assert "compile the model again" in hint


def test_a_file_that_vanishes_meanwhile_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="it is missing"):
        check_files(tmp_path, {"model.onnx"}, {"model.onnx": {"bytes": 1, "sha256": ""}})


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000 + "]" * 3000,
        '{"a": ' * 200 + "1" + "}" * 200,
        "1" * 100_000,
        '{"schema": NaN}',
        '{"schema": 1e999}',
        "[]",
        "null",
        "\ud800".encode("utf-8", "surrogatepass"),
        '{"schema": "asapc.report/3", "schema": "asapc.report/3"}',
    ],
)
def test_json_that_is_none_or_nests_deeply_is_refused(text, compiled, tmp_path):
    for name in ("report.json", "manifest.json"):
        folder = tamper(compiled, tmp_path / name / "out", "report.json", lambda report: None)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        if name == "report.json":
            relist(folder)
        assert_refused(CheckpointError, read_folder, folder, named=name)


def places(value: object, path: tuple = ()):
    """All places in JSON, by the keys that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def test_a_report_with_any_entry_replaced_is_read_or_refused(compiled, tmp_path):
    whole = json.loads((compiled / "report.json").read_text())
    folder = tamper(compiled, tmp_path / "out", "report.json", lambda report: None)
    messages = []
    for number, (*way, last) in enumerate(places(whole)):
        report = json.loads(json.dumps(whole))
        holder = report
        for key in way:
            holder = holder[key]
        holder[last] = ODD_VALUES[number % len(ODD_VALUES)]
        (folder / "report.json").write_text(json.dumps(report))
        relist(folder)
        try:
            read_folder(folder)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > number / 2
    assert all("report.json" in message for message in messages)


def test_a_report_that_is_malformed_where_verify_reads_it_is_refused(compiled, tmp_path):
    changes = {
        "steps": lambda report: report["sites"][0]["choice"].update(half_steps=10**9),
        "dual": lambda report: report["sites"][0]["choice"].update(operator="sliced_dual"),
        "range": lambda report: report["sites"][0].update(calibration_range=[1]),
        "budget": lambda report: report.update(budget=["relc<=much"]),
        "twice": lambda report: report["sites"].append(report["sites"][0]),
        "none": lambda report: report["sites"].clear(),
    }
    for name, change in changes.items():
        folder = tamper(compiled, tmp_path / name, "report.json", change)
        with pytest.raises(CheckpointError) as caught:
            verify_model(folder, compiled.parent / "data.npz")
        assert str(folder) in str(caught.value)


def test_random_changes_of_a_report_raise_nothing_else(compiled, tmp_path):
    rng = random.Random(0)
    folder = tamper(compiled, tmp_path / "out", "report.json", lambda report: None)
    for _ in range(60):
        (folder / "report.json").write_text(
            json.dumps(change_json(json.loads((compiled / "report.json").read_text()), rng))
        )
        relist(folder)
        with suppress(CheckpointError):
            read_folder(folder)


def test_code_of_a_file_that_the_folder_names_is_not_run(compiled):
    result = run("verify", compiled, "--data", compiled.parent / "data.npz", "--unsafe-load")
    assert "--teacher" in assert_user_error(result)[1]
