"""Reads what NVIDIA's compiler writes into its log."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYERS = "Layers:\n"  # begins the message that lists the engine's layers
LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>.*?), Inputs: \[(?P<inputs>.*?)\], (?:Constants: \[.*?\], )?"
    r"Outputs: \[(?P<outputs>.*)\], [^\[\]]*?TacticName: (?P<tactic>[^,]*), .*?Metadata: (?P<metadata>.*)$"
)
TYPE = re.compile(r"(?:Datatype|Format/Datatype): ([A-Za-z0-9_]+)")
NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
FUSED = re.compile(r"mha|fmha|attention", re.IGNORECASE)
SOURCE = re.compile(r"^(?:\[[^\]]*\]\s*)?(?:\w+\.(?:cpp|h):\d+:\s*)")
LOCATION = re.compile(r"\s*\.?\s*\bIn \w+ at /[^\s()]+")

# What helps, by what an error says; the first that it says counts.
HINTS = {
    "within workspace limit": "give a larger --workspace, or none",
    "not supported by a dedicated kernel": "compile with --precision float16, or with --lowering materialised",
    "K exceeds the maximum": "leave out sorted slices, as with --operators one-pass,hinges, or sort fewer elements",
    "lugin": "TensorRT has no such operation: replace it in the model",
    "out of memory": "free memory, or build for smaller sizes with --batch, --dynamic or --profile",
}
OTHERWISE = "omit --target for the ONNX file without an engine, and report this line"
UNKNOWN = "TensorRT has no such operation, or not in this form: replace it in the model, or omit --target"


def hint_on(reason: str, parsing: bool = False) -> str:
    """Return what to do about what an error says."""
    return next((hint for text, hint in HINTS.items() if text in reason), UNKNOWN if parsing else OTHERWISE)


def layers_of(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return the layers that the last list in a log has, as fields of `types.engine.EngineLayer`."""
    listed = next((line for line in reversed(lines) if line.startswith(LAYERS)), "")
    return [layer(match) for match in map(LAYER.match, listed.splitlines()) if match]


def layer(match: "re.Match[str]") -> dict[str, Any]:
    """Return the layer of one line."""
    types = dict.fromkeys(TYPE.findall(match["inputs"]) + TYPE.findall(match["outputs"]))
    return {
        "name": match["name"],
        "kind": match["kind"],
        "precision": list(types),
        "nodes": list(dict.fromkeys(NODE.findall(match["metadata"]))),
        "attention": bool(FUSED.search(match["name"]) or FUSED.search(match["tactic"])),
    }


def told(errors: Sequence[str]) -> str:
    """Return what errors say, each once and in their order, without places in NVIDIA's own source."""
    texts = (" ".join(LOCATION.sub("", SOURCE.sub("", error)).split()) for error in errors)
    # The parser frames a node by lines of its own; what it says of it stands in its errors.
    return "; ".join(dict.fromkeys(text for text in texts if text and not text.startswith("---")))


def node_at_end(lines: Sequence[str], model: Path) -> str | None:
    """Return the node of an ONNX file that the last lines of a log name, the longest name where a line has several."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        known = {node.name for node in onnx.load(model, load_external_data=False).graph.node}
    except DecodeError:
        return None
    for line in reversed(lines):
        # Names stand between blanks and brackets, two of them with dots between for all from one to the other.
        if found := known & set(re.split(r"[\s\[\]{}(),:]+|\.\.\.", line)) - {""}:
            return str(max(found, key=len))
    return None
