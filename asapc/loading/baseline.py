"""Reads the latency baselines that `asapc check --save-baseline` wrote, or that somebody wants to be taken for one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asapc.errors import CheckpointError, NotComparableError
from asapc.loading.schemas import departure
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.texts import read_json

SCHEMA = "asapc.baseline/1"
SAVE = "write a new one with --save-baseline"


def read_baseline(path: Path) -> dict[str, Any]:
    """Read a baseline, and check that it is whole.

    Raises:
        CheckpointError: it is none, or changed since it was written.
        NotComparableError: it is of another version.
    """
    source = Source.at(path, CheckpointError)
    content = read_json(source, SAVE)
    name, _, version = str(content.get("schema") if isinstance(content, dict) else None).partition("/")
    if name != SCHEMA.partition("/")[0]:
        raise source.refuse("it is no baseline of asapc check", SAVE)
    if f"{name}/{version}" != SCHEMA:
        reads = SCHEMA.partition("/")[2]
        raise NotComparableError(f"{path} is a baseline of version {version[:20]}, and this asapc reads {reads}", SAVE)
    if (why := departure(content, "baseline")) is not None:
        raise source.refuse(why, SAVE)
    if digest(content) != content["sha256"]:
        raise source.refuse("it changed since it was written", SAVE)
    for run in content["runs"]:
        shapes = [tuple(map(len, blocks)) for blocks in run["ms"].values()]
        if len(set(shapes)) > 1 or len(set(shapes[0])) > 1:
            raise source.refuse("its rounds are not the same for all", SAVE)
    return dict(content)


def digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all entries of a baseline but its own."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
