"""Reads torch.export archives (.pt2) without running code that they hold.

`torch.export.load` trusts its file. It unpickles sample inputs, tensor subclasses and constants, evaluates guards and
symbolic sizes as Python, builds Python source from the names of nodes, resolves operators by attribute from the
module `torch`, imports what the structure of inputs names, and loads native libraries. So it never gets the file.
The members are checked here, and those that pass go into a new archive: the graph as JSON in which every string has an
expected form, and the bytes of the tensors. torch reads the new one.
"""

import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from asapc.errors import CheckpointError
from asapc.loading.pt2.allowed import SYMBOL, check_expression, check_operator, check_tree
from asapc.loading.untrusted.demand import Demand
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.tensors import MAX_VIEWS_BYTES, MAX_VIEWS_RATIO, read_torch_stream
from asapc.loading.untrusted.texts import read_json_stream
from asapc.loading.untrusted.zips import check_zip

MODEL = "models/model.json"
INPUTS = "data/sample_inputs/model.pt"
PAYLOADS = {
    "data/weights/model_weights_config.json": "data/weights/",
    "data/constants/model_constants_config.json": "data/constants/",
}
# Everything else is dropped: compiled libraries, extra files.
COPIED = ("archive_format", "archive_version", "byteorder", ".data/version")
# Names of nodes become Python source, names of weights become attributes.
NAME = re.compile(r"\w*", re.ASCII)
NUMBER = re.compile(r"-?Infinity|NaN")  # strings in JSON
WEIGHT = re.compile(r"(?!__)\w*(?:\.(?!__)[\w-]*)*", re.ASCII)
WEIGHT_KEYS = ("config", "fqn", "parameter_name", "buffer_name", "tensor_constant_name")
MAX_GRAPH_BYTES = 2**28
ANEW = "export the model again, in evaluation mode, with torch.export.export and torch.export.save"


def read_archive(source: Source) -> tuple[ExportedProgram, Any]:
    """Read a .pt2 archive.

    Returns:
        The program, and its sample inputs (args, kwargs), or None where the archive has none.

    Raises:
        CheckpointError: the archive is damaged or of an older torch, or holds what could run code.
    """
    with source.path.open("rb") as file:
        check_zip(file, source)
        with source.reading(), zipfile.ZipFile(file) as archive:
            members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    if not {MODEL, *PAYLOADS} <= members.keys():
        raise source.refuse("it is from an older torch, or holds no model named 'model'", ANEW)
    inputs = None
    if sample := members.get(INPUTS):
        inputs = read_torch_stream(io.BytesIO(sample), source.member(INPUTS, len(sample)))
    with source.reading(), silence():
        rebuilt = io.BytesIO(rebuild(members, source))
        # Not torch.export.load, which logs a traceback before it raises.
        from torch.export.pt2_archive._package import load_pt2

        program = load_pt2(rebuilt).exported_programs["model"]
        check_casts(program, source)
        with torch.no_grad():
            # As in `capturing.export`: no in-place writes.
            program = program.run_decompositions({})
    return program, inputs


def check_casts(program: ExportedProgram, source: Source) -> None:
    """Raise CheckpointError where a program casts to bfloat16 automatically, of which ONNX Runtime has no products."""
    modules = [module for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    for node in (node for module in modules for node in module.graph.nodes):
        if str(node.target) == "wrap_with_autocast" and torch.bfloat16 in node.args and True in node.args[:3]:
            raise CheckpointError(
                f"{source} was exported with automatic casts to bfloat16 (torch.autocast)",
                "export it without, or give the checkpoint with --model: code is captured without its automatic casts",
            )


@contextmanager
def silence() -> Iterator[None]:
    """Keep torch from logging what the refusal says already."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def rebuild(members: Mapping[str, bytes], source: Source) -> bytes:
    """Build a new archive of what torch may read."""
    contents = {name: members[name] for name in COPIED if name in members}
    contents[INPUTS] = b""
    graph = json.dumps(clean(read_member(MODEL, members, source), "", source))
    Demand(source).add_nodes(graph.count('"target": '))  # in strings the quotes are escaped
    contents[MODEL] = graph.encode()
    for config, folder in PAYLOADS.items():
        payloads = read_member(config, members, source)
        names = check_payloads(payloads, folder, members, source)
        contents[config] = json.dumps(clean(payloads, "", source)).encode()
        contents |= {name: members[name] for name in names}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            archive.writestr(f"model/{name}", content)
    return buffer.getvalue()


def read_member(name: str, members: Mapping[str, bytes], source: Source) -> Any:
    """Read the JSON of a member, which of a large model is long."""
    content = members[name]
    return read_json_stream(io.BytesIO(content), source.member(name, len(content)), ANEW, MAX_GRAPH_BYTES)


def clean(value: Any, key: str, source: Source) -> Any:
    """Copy the JSON of a graph, in which every string must have the form that its key calls for.

    Raises:
        CheckpointError: one has another form.
    """
    if isinstance(value, dict):
        return {name: clean_entry(name, item, key, source) for name, item in value.items()}
    if isinstance(value, list):
        return [clean(item, key, source) for item in value]
    if isinstance(value, str) and not check_string(key, value):
        raise refusal(source, value)
    return value


def check_string(key: str, text: str) -> bool:
    """Return whether a string of a graph's JSON has the form that its key calls for."""
    match key:
        case "expr_str":
            return check_expression(text)
        case "target" | "as_operator":
            return check_operator(text)
        case "in_spec" | "out_spec":
            return check_tree(text)
        case "as_string" | "as_strings":  # torch quotes them wherever they go
            return True
    if key in WEIGHT_KEYS:
        return WEIGHT.fullmatch(text) is not None
    return (NAME.fullmatch(text) or NUMBER.fullmatch(text)) is not None


def clean_entry(name: str, value: Any, key: str, source: Source) -> Any:
    """Clean one entry of the mapping under `key`, as `clean` does."""
    expected = {"range_constraints": SYMBOL, "config": WEIGHT}.get(key, NAME)
    if not expected.fullmatch(name) or name == "as_custom_obj":
        raise refusal(source, name)
    match name:
        case "guards_code":  # Python source; the guards repeat what the graph says
            return []
        case "torch_version":
            return torch.__version__
        case "treespec_namedtuple_fields":
            return {}
        case "device" | "as_device":  # the archive may come from a GPU
            return {"type": "cpu", "index": None}
        case "metadata":  # where a node comes from; nothing else is of use here
            origin = ("stack_trace", "nn_module_stack")
            return {k: printable(text) for k, text in value.items() if k in origin and isinstance(text, str)}
        case "module_call_graph":  # signatures of inner modules serve to take the graph apart again
            return [
                clean({**entry, "signature": entry["signature"] if entry["fqn"] == "" else None}, name, source)
                for entry in value
            ]
    return clean(value, name, source)


def printable(text: str) -> str:
    """Replace the characters that would control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def check_payloads(config: Any, folder: str, members: Mapping[str, bytes], source: Source) -> set[str]:
    """Return the names of the members that hold the tensors of a payload config, all raw and as long as it says.

    Raises:
        CheckpointError: one is pickled, missing, or claims more than it holds.
    """
    names, claimed = set(), 0
    limit = max(8 * MAX_VIEWS_RATIO * source.size, MAX_VIEWS_BYTES)
    for entry in config["config"].values():
        name, meta = entry["path_name"], entry["tensor_meta"]
        if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d{1,9}", name) or meta is None:
            raise refusal(source, name, "is pickled")
        size = 8 * prod(int(length["as_int"]) for length in meta["sizes"])  # bytes, as if each element had eight
        claimed += size
        content = members.get(folder + name)
        if content is None or (size and not content) or claimed > limit:
            raise source.refuse(f"its tensor {name} is not as long as it claims")
        names.add(folder + name)
    return names


def refusal(source: Source, content: object, why: str = "is not expected there") -> CheckpointError:
    """Return the error for a graph that holds something unexpected."""
    return CheckpointError(
        f"{source} holds a graph that could run code when loaded: {str(content)[:80]!r} {why}; nothing was run", ANEW
    )
