"""Reads folders that `asapc compile` wrote, or that somebody wants to be taken for one."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asapc.errors import AsapcError, CheckpointError, OptionError
from asapc.loading.onnx.reader import check_self_contained
from asapc.loading.schemas import departure, read_schema
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.texts import read_json
from asapc.types.budget import parse_bound

MANIFEST, REPORT, MODEL, OPERATORS = "manifest.json", "report.json", "model.onnx", "operator.safetensors"
COMPILE = "compile the model again"


def read_folder(folder: Path) -> dict[str, Any]:
    """Check a folder, and return its report.

    It holds regular files alone, just those that its manifest lists, with their sizes and hashes; manifest and report
    keep to their schemas, and fit each other and the files.

    Raises:
        CheckpointError: one of these does not hold; the message names the file.
    """
    names = list_files(folder)
    manifest = read_checked(folder / MANIFEST)
    check_files(folder, names, manifest["files"])
    report = read_checked(folder / REPORT)
    check_report(folder, report, manifest)
    check_self_contained(Source.at(folder / MODEL, CheckpointError))
    return report


def list_files(folder: Path) -> set[str]:
    """Return the names of a folder's files, all of which are regular; links are not."""
    try:
        entries = sorted(folder.iterdir())
    except (OSError, ValueError):
        if not os.path.lexists(folder):
            raise CheckpointError(f"cannot read {folder}: no such folder", "check the path") from None
        raise CheckpointError(f"{folder} was not written by `asapc compile`", COMPILE) from None
    for entry in entries:
        if entry.is_symlink() or not entry.is_file():
            raise refusal(entry, "it is not a regular file")
    names = {entry.name for entry in entries}
    if MANIFEST not in names:
        raise CheckpointError(f"{folder} was not written by `asapc compile`, or is incomplete", COMPILE)
    return names


def check_files(folder: Path, names: set[str], files: Mapping[str, Any]) -> None:
    """Refuse files that are missing, not listed or changed; sizes are compared first, since hashes take time."""
    for name in sorted(files.keys() - names):
        raise refusal(folder / name, "it is missing")
    for name in sorted(names - files.keys() - {MANIFEST}):
        raise refusal(folder / name, f"{MANIFEST} does not list it")
    for name, facts in files.items():
        if (folder / name).stat().st_size != facts["bytes"]:
            raise refusal(folder / name, "it changed since it was written")
    for name, facts in files.items():
        if Source.at(folder / name, CheckpointError).sha256 != facts["sha256"]:
            raise refusal(folder / name, "it changed since it was written")


def read_checked(path: Path) -> dict[str, Any]:
    """Read a manifest or report that keeps to its schema."""
    content: Any = read_json(Source.at(path, CheckpointError), COMPILE)
    check_version(path, content)
    if (why := departure(content, path.stem)) is not None:
        raise refusal(path, why)
    kept: dict[str, Any] = content
    return kept


def check_version(path: Path, content: Any) -> None:
    """Refuse a manifest or report of another version of asapc, which is whole and still cannot be read."""
    expected = read_schema(path.stem)["properties"]["schema"]["const"]
    version = content.get("schema") if isinstance(content, dict) else None
    if version != expected and re.fullmatch(re.escape(expected.partition("/")[0]) + r"/\d{1,4}", str(version)):
        why = f"{path.name} is {version}, this one reads {expected}"
        raise CheckpointError(f"{path.parent} was written by another version of asapc: {why}", COMPILE)


def check_report(folder: Path, report: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Refuse a report that does not fit the manifest, or whose budget cannot be read."""
    sites = [site["name"] for site in report["sites"]]
    if not sites:
        raise refusal(folder / REPORT, "it lists no sites, and no model without any is compiled")
    if len(set(sites)) < len(sites):
        raise refusal(folder / REPORT, "two sites have the same name")
    if report["model"]["sha256"] != manifest["model_sha256"]:
        raise refusal(folder / REPORT, f"it is of another model than {MANIFEST}")
    for artifact in report["artifacts"]:
        if manifest["files"].get(artifact["path"], {}).get("sha256") != artifact["sha256"]:
            raise refusal(folder / REPORT, f"{MANIFEST} has no such file as its {artifact['path'][:80]!r}")
    runs = {(run["name"], run["batch"]) for run in report["latency"]["runs"]}
    if lacking := {name for name, _ in runs} - report["fidelity"]["variants"].keys():
        raise refusal(folder / REPORT, f"it has the latency of {min(lacking)}, and not its fidelity")
    if any(("compiled", batch) not in runs for _, batch in runs):
        raise refusal(folder / REPORT, "it lacks the latency of the compiled model")
    try:
        for term in report["budget"]:
            parse_bound(term)
    except OptionError as error:
        raise refusal(folder / REPORT, str(error)) from None


def refusal(path: Path, why: str) -> AsapcError:
    """Return the error that says what is wrong with a file of a folder."""
    return CheckpointError(f"cannot read {path}: {why}", COMPILE)
