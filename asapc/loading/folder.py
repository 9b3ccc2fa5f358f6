"""Reads folders that `asapc compile` wrote, or that somebody wants to be taken for one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from asapc.errors import CheckpointError, InputError, OptionError, SamplesError
from asapc.loading.manifest import MANIFEST, MODEL, read_checked, read_manifest, refusal
from asapc.loading.onnx.reader import check_self_contained
from asapc.loading.untrusted.source import Source
from asapc.types.budget import parse_bound
from asapc.types.interface import Interface
from asapc.types.samples import Samples

REPORT, OPERATORS = "report.json", "operator.safetensors"


def read_folder(folder: Path) -> dict[str, Any]:
    """Check a folder, and return its report.

    It holds regular files alone, just those that its manifest lists, with their sizes and hashes; manifest and report
    keep to their schemas, and fit each other and the files.

    Raises:
        CheckpointError: one of these does not hold; the message names the file.
    """
    manifest = read_manifest(folder)
    report = read_checked(folder / REPORT)
    check_report(folder, report, manifest)
    check_self_contained(Source.at(folder / MODEL, CheckpointError))
    return report


def check_lengths(folder: Path, samples: Samples) -> None:
    """Raise SamplesError where samples have lengths that a compiled model does not take; their number may be any.

    Of a folder that `read_folder` has checked.
    """
    interface = Interface.of(read_checked(folder / MANIFEST))
    batches = {info.shape[0] for info in interface.inputs}
    axes = {name: limits for name, limits in interface.axes.items() if name not in batches}
    interface = replace(interface, axes=axes)
    lengths: dict[str, tuple[str, int]] = {}
    for info in interface.inputs:
        try:
            interface.check_shape(info, tuple(samples.inputs[info.name].shape), lengths)
        except InputError as error:
            raise SamplesError(str(error), error.hint) from None


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
