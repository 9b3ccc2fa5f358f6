"""Reads the costs that `asapc costs` measured."""

from pathlib import Path

from asapc.errors import OptionError, printable
from asapc.loading.schemas import departure, read_schema
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.texts import read_json
from asapc.types.costs import SCHEMA, CostModel

# What softmax consists of, on a matrix of scores and in fused passes. One kind of each takes time, since ratios are
# taken to softmax; a fit may leave the others at nothing.
SOFTMAX = ({"call", "product", "softmax"}, {"call", "fused_call", "fused_product", "fused_softmax"})
MEASURE = "measure costs with `asapc costs --out FILE`, or omit --costs"


def read_costs(path: Path) -> CostModel:
    """Read a file of costs.

    Raises:
        OptionError: it cannot be read, or is damaged, of another version or about other operators.
    """
    source = Source.at(path, OptionError)
    content = read_json(source, MEASURE)
    version = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(version, str) or not version.startswith("asapc.costs/"):
        raise source.refuse("it is no file of costs", MEASURE)
    if version != SCHEMA:
        raise source.refuse(f"it is of version {version[:40]}, and this asapc reads {SCHEMA}", MEASURE)
    kinds = set(read_schema("costs")["properties"]["milliseconds"]["required"])
    costs = content.get("milliseconds")
    if isinstance(costs, dict) and costs.keys() != kinds:
        odd = min(costs.keys() ^ kinds)
        what = f"it lacks the costs of {odd!r}" if odd in kinds else f"it has costs of {odd[:40]!r}"
        raise source.refuse(f"it is about other operators: {what}", MEASURE)
    if (why := departure(content, "costs")) is not None:
        raise source.refuse(why, MEASURE)
    if not all(any(costs[kind] > 0 for kind in kinds) for kinds in SOFTMAX):
        raise source.refuse("by its costs softmax takes no time", MEASURE)
    device = printable(content["device"])
    return CostModel(content["provider"], content["precision"], device, costs, content["median_error"], path)
