"""Baselines that were tampered with, cut off, or are none are refused with one line, and never pass."""

import json

import pytest

from asapc.errors import CheckpointError, NotComparableError
from asapc.loading.baseline import digest, read_baseline


def content() -> dict:
    rest = {
        "schema": "asapc.baseline/1",
        "asapc": "0.1.0",
        "date": "2026-01-01T00:00:00+00:00",
        "folder": "out",
        "fingerprint": {"cpu": "a"},
        "conditions": {},
        "reference": "",
        "runs": [{"batch": 1, "ms": {"head": [[1.0, 2.0]] * 2, "reference": [[1.0, 1.5]] * 2}}],
    }
    return {**rest, "sha256": digest(rest)}


def signed(data: dict) -> dict:
    return {**data, "sha256": digest(data)}


def write(path, data) -> None:
    path.write_text(data if isinstance(data, str) else json.dumps(data))


def test_a_baseline_is_read(tmp_path):
    write(tmp_path / "b.json", content())
    assert read_baseline(tmp_path / "b.json") == content()


def ragged(data: dict) -> dict:
    data["runs"][0]["ms"]["head"] = [[1.0, 2.0], [1.0]]
    return signed(data)


def faster(data: dict) -> dict:
    data["runs"][0]["ms"]["head"][0][0] = 0.5
    return data


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (faster, "it changed since it was written"),
        (lambda data: {**data, "fingerprint": {"cpu": "b"}}, "it changed since it was written"),
        (ragged, "its rounds are not the same for all"),
        (lambda data: signed({**data, "runs": []}), "runs"),
        (lambda data: signed({**data, "more": 1}), "more"),
        (lambda data: {name: value for name, value in data.items() if name != "sha256"}, "sha256"),
        (lambda data: json.dumps(data)[:-20], "cannot read"),
        (lambda data: "[]", "it is no baseline"),
        (lambda data: "null", "it is no baseline"),
        (lambda data: "", "it is empty"),
        (lambda data: {"schema": "asapc.report/2"}, "it is no baseline"),
        (lambda data: {"schema": {"asapc.baseline/1": 1}}, "it is no baseline"),
    ],
)
def test_what_is_no_whole_baseline_is_refused(change, reason, tmp_path):
    write(tmp_path / "b.json", change(content()))
    with pytest.raises(CheckpointError, match="cannot read") as caught:
        read_baseline(tmp_path / "b.json")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_baseline_of_another_version_is_not_comparable(tmp_path):
    write(tmp_path / "b.json", {**content(), "schema": "asapc.baseline/2", "new": True})
    with pytest.raises(NotComparableError, match="version 2, and this asapc reads 1"):
        read_baseline(tmp_path / "b.json")
