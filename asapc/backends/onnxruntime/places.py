"""Where the nodes of an exported ONNX model come from: the user's module and line."""

import ast
import re
from typing import Any

from asapc.loading.lines import is_machinery
from asapc.passes.rewrite.sinkhorn import SITE_MARK
from asapc.types.engine import Place

FRAME = re.compile(r'File "([^"\n]+)", line (\d+)')


def places_of(model: Any) -> dict[str, Place]:
    """Return the places of nodes by their names.

    Args:
        model: a ModelProto as torch's exporter writes it, with what it says about every node.
    """
    places: dict[str, Place] = {}
    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        frames = FRAME.findall(notes.get("pkg.torch.onnx.stack_trace", ""))
        own = [f"{file}:{line}" for file, line in frames if not is_machinery(file)]
        modules = [scope for scope in scopes[:-1] if not scope.startswith(SITE_MARK)]  # the last is the operation
        site = next((scope.removeprefix(SITE_MARK) for scope in scopes if scope.startswith(SITE_MARK)), None)
        places[node.name] = Place(modules[-1] if modules else None, own[-1] if own else None, site)
    return places
