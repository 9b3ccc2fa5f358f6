"""Reads torch.export archives (.pt2) without running code that they hold.

`torch.export.load` trusts its file. It unpickles sample inputs, tensor subclasses and constants, evaluates guards and
symbolic sizes as Python, builds Python source from the names of nodes, resolves operators by attribute from the
module `torch`, imports what the structure of inputs names, and loads native libraries. So it never sees the file.
Its members are looked through here, and a new archive is made of what has passed: the graph as JSON in which every
string is of an expected form, and the bytes of the tensors. torch reads that one.
"""

import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from asapc.errors import CheckpointError
from asapc.loading.pt2.allowed import SYMBOL, check_expression, check_operator, check_tree
from asapc.loading.untrusted.files import check_file
from asapc.loading.untrusted.refusals import unreadable
from asapc.loading.untrusted.tensors import VIEWS_BYTES, VIEWS_RATIO, damage, read_torch_stream
from asapc.loading.untrusted.zips import check_zip

MODEL = "models/model.json"
INPUTS = "data/sample_inputs/model.pt"
PAYLOADS = {
    "data/weights/model_weights_config.json": "data/weights/",
    "data/constants/model_constants_config.json": "data/constants/",
}
# All else in an archive is dropped: compiled libraries, extra files.
COPIED = ("archive_format", "archive_version", "byteorder", ".data/version")
# Names of nodes become Python source, those of weights attributes.
NAME = re.compile(r"\w*", re.ASCII)
NUMBER = re.compile(r"-?Infinity|NaN")  # which JSON has as text
WEIGHT = re.compile(r"(?!__)\w*(?:\.(?!__)[\w-]*)*", re.ASCII)
WEIGHT_KEYS = ("config", "fqn", "parameter_name", "buffer_name", "tensor_constant_name")
JSON_BYTES = 2**28
ANEW = "export the model anew, in evaluation mode, with torch.export.export and torch.export.save"


def read_archive(path: Path) -> tuple[ExportedProgram, Any]:
    """Read a .pt2 archive.

    Returns:
        The program, and its sample inputs (args, kwargs), None where the archive has none.

    Raises:
        CheckpointError: the archive is damaged or of an older torch, or holds what could run code.
    """
    size = check_file(path, CheckpointError)
    with path.open("rb") as file:
        check_zip(file, path, CheckpointError)
        with damage(path, CheckpointError), zipfile.ZipFile(file) as archive:
            members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    if not {MODEL, *PAYLOADS} <= members.keys():
        raise unreadable(path, CheckpointError, "it is of an older torch, or holds no model named 'model'", ANEW)
    inputs = None
    if sample := members.get(INPUTS):
        inputs = read_torch_stream(io.BytesIO(sample), len(sample), f"{INPUTS} in {path}", CheckpointError)
    with damage(path, CheckpointError), silence():
        rebuilt = io.BytesIO(rebuild(members, size, path))
        # Not torch.export.load, which logs a traceback before it raises.
        from torch.export.pt2_archive._package import load_pt2

        program = load_pt2(rebuilt).exported_programs["model"]
        with torch.no_grad():
            # As in `capture.export`: no writes in place.
            program = program.run_decompositions({})
    return program, inputs


@contextmanager
def silence() -> Iterator[None]:
    """Keep torch from logging what the one message says."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def rebuild(members: Mapping[str, bytes], size: int, path: Path) -> bytes:
    """A new archive of what torch may read."""
    made = {name: members[name] for name in COPIED if name in members}
    made[INPUTS] = b""
    made[MODEL] = json.dumps(clean(read_json(members[MODEL], path), "", path)).encode()
    for config, folder in PAYLOADS.items():
        payloads = read_json(members[config], path)
        names = check_payloads(payloads, folder, members, size, path)
        made[config] = json.dumps(clean(payloads, "", path)).encode()
        made |= {name: members[name] for name in names}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in made.items():
            archive.writestr(f"model/{name}", content)
    return buffer.getvalue()


def read_json(content: bytes, path: Path) -> Any:
    """JSON of an archive's member; deep nesting raises RecursionError, which counts as damage."""
    if len(content) > JSON_BYTES:
        raise unreadable(path, CheckpointError, "its graph is too long", ANEW)
    return json.loads(content)


def clean(value: Any, key: str, path: Path) -> Any:
    """Copy the JSON of a graph; every string in it must be of the form that its key calls for.

    Raises:
        CheckpointError: one is not.
    """
    if isinstance(value, dict):
        return {name: clean_entry(name, item, key, path) for name, item in value.items()}
    if isinstance(value, list):
        return [clean(item, key, path) for item in value]
    if isinstance(value, str):
        if key == "expr_str":
            passed = check_expression(value)
        elif key in ("target", "as_operator"):
            passed = check_operator(value)
        elif key in ("in_spec", "out_spec"):
            passed = check_tree(value)
        elif key in ("as_string", "as_strings"):  # quoted wherever they go
            passed = True
        elif key in WEIGHT_KEYS:
            passed = WEIGHT.fullmatch(value) is not None
        else:
            passed = (NAME.fullmatch(value) or NUMBER.fullmatch(value)) is not None
        if not passed:
            raise refusal(path, value)
    return value


def clean_entry(name: str, value: Any, key: str, path: Path) -> Any:
    """`clean` of one entry of a mapping that stands under `key`."""
    expected = {"range_constraints": SYMBOL, "config": WEIGHT}.get(key, NAME)
    if not expected.fullmatch(name) or name == "as_custom_obj":
        raise refusal(path, name)
    match name:
        case "guards_code":  # Python source; the guards repeat what the graph says
            return []
        case "torch_version":
            return torch.__version__
        case "treespec_namedtuple_fields":
            return {}
        case "device" | "as_device":  # of an archive made on a GPU
            return {"type": "cpu", "index": None}
        case "metadata":  # where a node comes from; the rest is of no use here
            kept = ("stack_trace", "nn_module_stack")
            return {k: printable(v) for k, v in value.items() if k in kept and isinstance(v, str)}
        case "module_call_graph":  # signatures of inner modules serve to take the graph apart again
            return [
                clean({**entry, "signature": entry["signature"] if entry["fqn"] == "" else None}, name, path)
                for entry in value
            ]
    return clean(value, name, path)


def printable(text: str) -> str:
    """Text without what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def check_payloads(config: Any, folder: str, members: Mapping[str, bytes], size: int, path: Path) -> set[str]:
    """Names of the members that hold the tensors of a payload config, all raw and as long as it says.

    Raises:
        CheckpointError: one is pickled, missing, or claims more than it holds.
    """
    names, claimed = set(), 0
    for entry in config["config"].values():
        name, meta = entry["path_name"], entry["tensor_meta"]
        if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d{1,9}", name) or meta is None:
            raise refusal(path, name, "is pickled")
        # Bytes, as if each element had eight.
        wanted = 8 * prod(int(length["as_int"]) for length in meta["sizes"])
        claimed += wanted
        held = members.get(folder + name)
        if held is None or (wanted and not held) or claimed > max(8 * VIEWS_RATIO * size, VIEWS_BYTES):
            raise unreadable(path, CheckpointError, f"its tensor {name} is not as long as it claims")
        names.add(folder + name)
    return names


def refusal(path: Path, found: object, why: str = "is not expected there") -> CheckpointError:
    """The error for a graph that holds what it should not."""
    return CheckpointError(
        f"{path} holds a graph that could run code when loaded: {str(found)[:80]!r} {why}; nothing was run", ANEW
    )
