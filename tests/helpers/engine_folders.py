"""Makes folders of `asapc compile` hold an engine, so that manifest and report fit it."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.folders import relist


def with_engine(
    compiled: Path,
    target: Path,
    data: bytes,
    builder: str = "tensorrt 10.13.3.9",
    targets: Sequence[str] = ("SM89",),
    compatible: Sequence[str] = (),
    **environment: Any,
) -> Path:
    """Copy a folder and put an engine into it; `environment` replaces entries of the report's."""
    shutil.copytree(compiled, target)
    (target / "model.engine").write_bytes(data)
    report = json.loads((target / "report.json").read_text())
    report["engine"]["status"] = "built"
    report["environment"] |= environment
    artifact = {
        "kind": "engine",
        "path": "model.engine",
        "sha256": hashlib.sha256(data).hexdigest(),
        "builder": builder,
        "targets": list(targets),
        "refused": {},
        "compatible": list(compatible),
    }
    report["artifacts"] = [entry for entry in report["artifacts"] if entry["kind"] != "engine"] + [artifact]
    (target / "report.json").write_text(json.dumps(report))
    relist(target)
    return target
