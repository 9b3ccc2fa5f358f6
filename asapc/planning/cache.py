"""Keeps what was fitted and checked, so that another budget for the same model takes seconds.

An entry is one file, named by a hash of all that it follows from: the captured graph with its tensors, the samples, the
options, the threads, and the code of asapc and torch. So what is no longer right is never found. It holds safetensors,
with the rest of the entry among them as JSON, after a hash of both. The folder is safe to delete at any time.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from asapc import passes
from asapc.config import CompileConfig
from asapc.hashes import add_value
from asapc.process.caches import cache_folder, replacing
from asapc.types.choices import Alternatives, AmortisedParams, Candidate, SlicedDualParams
from asapc.types.costs import CostModel
from asapc.types.results import Fidelity, Hop, Metric, SiteFidelity, VariantFidelity
from asapc.types.teacher import Teacher

MAX_BYTES = 2**28  # of the folder; entries that were not read for longest go first
SUFFIX = ".plan"
REST = "rest"  # the name of the tensor that holds the JSON, as bytes
DIGEST = hashlib.sha256().digest_size
# Options that decide what there is to choose among. The captured graph holds what those of reading do.
DECISIVE = ("level", "lowering", "dynamic", "operators", "slices", "pieces", "batches", "seed")


@dataclass(frozen=True, eq=False)
class Entry:
    """What is kept of one model.

    Attributes:
        alternatives: what there is to choose among.
        checks: fidelity of selections that were checked, see `planning.check.Check`.
    """

    alternatives: Alternatives
    checks: dict[str, Fidelity] = field(default_factory=dict)


class Cache:
    """A folder of entries.

    Attributes:
        folder: where it is.
        note: what went wrong with the folder or an entry, in words; empty where nothing did.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder("plans") if folder is None else folder
        self.note = ""

    def read(self, key: str) -> Entry | None:
        """Return an entry; None where there is none, or it is damaged."""
        path = self.folder / f"{key}{SUFFIX}"
        try:
            content = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.note = f"the cache cannot be read: {path}: {(error.strerror or 'unknown reason').lower()}"
            return None
        if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
            self.note = f"fitted anew, since a file of the cache is damaged: {path}"
            return None
        return unpack(content[DIGEST:])

    def write(self, key: str, entry: Entry) -> None:
        """Keep an entry, and remove the oldest others where there are too many."""
        content = pack(entry)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / f"{key}{SUFFIX}") as partial:
                partial.write_bytes(hashlib.sha256(content).digest() + content)
            self.shrink()
        except OSError as error:
            why = (error.strerror or "unknown reason").lower()
            self.note = f"nothing was kept for another run: {error.filename2 or error.filename or self.folder}: {why}"

    def shrink(self) -> None:
        """Remove entries that were not read for longest, until the folder is small enough, and files half written."""
        with suppress(FileNotFoundError):  # another process may do the same
            files = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
            total = 0
            for path in files:
                total += path.stat().st_size
                if total > MAX_BYTES:
                    path.unlink()


def cache_of(config: CompileConfig) -> Cache | None:
    """Return the cache of the user, None where the options do without."""
    return None if config.no_cache else Cache()


def cache_note(cache: Cache | None) -> str:
    """Return what is to be said of a cache after its use, to follow other words."""
    return f"; {cache.note}" if cache is not None and cache.note else ""


def key_of(teacher: Teacher, config: CompileConfig, model: CostModel) -> str:
    """Return what an entry follows from, hashed."""
    program = teacher.graph.program
    digest = hashlib.sha256(code_digest())
    options = {name: getattr(config, name) for name in DECISIVE}
    for line in (torch.__version__, torch.get_num_threads(), torch.get_default_dtype(), options, model):
        digest.update(f"{line}\n".encode())
    for name, module in program.graph_module.named_modules():
        if isinstance(module, GraphModule):
            digest.update(f"{name}\n{module.graph}\n".encode())
    for name, value in (*program.state_dict.items(), *program.constants.items(), *tensors_of(teacher)):
        add_value(digest, name, value)
    return digest.hexdigest()


def tensors_of(teacher: Teacher) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the samples of a teacher, under names."""
    for name, samples in (("calibration", teacher.calibration), ("held out", teacher.held_out)):
        yield from ((f"{name} {key}", value) for key, value in samples.inputs.items())
        yield f"{name} labels", samples.labels


@cache
def code_digest() -> bytes:
    """Return a hash of the code of asapc, which changes more often than its version."""
    digest = hashlib.sha256()
    for root in (Path(__file__).parents[1], Path(passes.__file__).parent):
        for path in sorted((*root.rglob("*.py"), *root.rglob("*.json"))):
            digest.update(f"{path.relative_to(root)}\n".encode())
            digest.update(path.read_bytes())
    return digest.digest()


def pack(entry: Entry) -> bytes:
    """Write an entry as safetensors."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # the candidates of a fit share its tensors

    def place(tensor: Tensor) -> str:
        if id(tensor) not in names:
            names[id(tensor)] = f"tensor {len(tensors)}"
            tensors[names[id(tensor)]] = tensor.contiguous()
        return names[id(tensor)]

    def plain(candidate: Candidate) -> dict[str, Any]:
        values = {f.name: getattr(candidate, f.name) for f in fields(Candidate)}
        params: Any = None
        if isinstance(candidate.params, SlicedDualParams):
            params = {f.name: placed(getattr(candidate.params, f.name)) for f in fields(SlicedDualParams)}
        elif candidate.params is not None:
            params = {name: placed(value) for name, value in candidate.params._asdict().items()}
        return values | {"fidelity": candidate.fidelity and asdict(candidate.fidelity), "params": params}

    def placed(value: Any) -> Any:
        if isinstance(value, tuple):
            return [placed(item) for item in value]
        return place(value) if isinstance(value, Tensor) else value

    alternatives = entry.alternatives
    rest = {
        "candidates": {name: [plain(c) for c in of_site] for name, of_site in alternatives.candidates.items()},
        "wide": sorted(alternatives.wide),
        "ranges": alternatives.ranges,
        "checks": {name: asdict(fidelity) for name, fidelity in entry.checks.items()},
    }
    tensors[REST] = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
    content: bytes = save(tensors)
    return content


def unpack(content: bytes) -> Entry:
    """Read an entry from safetensors."""
    from safetensors.torch import load

    tensors = load(content)
    rest = json.loads(tensors[REST].numpy().tobytes())

    def candidate(values: dict[str, Any]) -> Candidate:
        fidelity = values["fidelity"] and SiteFidelity(**values["fidelity"])
        kind = AmortisedParams if values["operator"] == "amortised" else SlicedDualParams
        params = values["params"] and kind(**{n: tensor_of(v) for n, v in values["params"].items()})
        return Candidate(**(values | {"fidelity": fidelity, "params": params}))

    def tensor_of(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(tensor_of(item) for item in value)
        return tensors.get(value, value) if isinstance(value, str) else value

    candidates = {name: [candidate(values) for values in of_site] for name, of_site in rest["candidates"].items()}
    ranges = {name: tuple(limits) for name, limits in rest["ranges"].items()}
    alternatives = Alternatives(candidates, frozenset(rest["wide"]), ranges)
    return Entry(alternatives, {name: fidelity_of(values) for name, values in rest["checks"].items()})


def fidelity_of(values: Mapping[str, Any]) -> Fidelity:
    """Make a fidelity of what `asdict` made of it."""
    parts = {
        "metric": values["metric"] and Metric(**values["metric"]),
        "hops": tuple(Hop(**hop) for hop in values["hops"]),
        "variants": {name: VariantFidelity(**variant) for name, variant in values["variants"].items()},
        "sites": {name: SiteFidelity(**site) for name, site in values["sites"].items()},
    }
    return Fidelity(**{**values, **parts})
