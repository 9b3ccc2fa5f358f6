"""What damaged and crafted files do: each is to be read or refused in one line, and nothing in it to run.

    python -m benchmarks.hostile                # 10,000 files
    python -m benchmarks.hostile --files 1000

Each file is read as a command would read it, in a process of its own that ends with the command's exit code: 1 for a
file that is refused, 0 for one that the damage left whole. Counts all else: other exit codes and signals, tracebacks,
more or less than one error and one hint, code that ran, crafted files that were accepted, more than TIME_LIMIT seconds,
and more memory than ten times the file and BASE. Writes benchmarks/results/hostile.json, and exits with 1 where any of
that happened.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from asapc.capturing.onnx import check_memory
from asapc.commands.compile import compile_model
from asapc.config import CompileConfig
from asapc.loading.factories import read_arguments
from asapc.loading.folder import read_folder
from asapc.loading.model import load_model
from asapc.loading.samples import load_samples
from asapc.terminal import exit_codes
from asapc.types.samples import Samples
from asapc.writing.environment import environment
from asapc.writing.folder import write_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from helpers.command import write_checkpoint  # noqa: E402
from helpers.damage import (  # noqa: E402
    AMBIGUOUS,
    DAMAGE,
    damage_graph,
    damage_header,
    damage_json,
    damage_member,
    swap_members,
)
from helpers.folders import relist  # noqa: E402
from helpers.hostile import BOMB_FORMATS, Bomb  # noqa: E402
from helpers.whole import whole_files  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "hostile.json"
SEED = 0
TIME_LIMIT = 60
MAX_RATIO = 10
BASE = 2**30  # bytes; what constants and views may take in small files, see asapc/loading/untrusted
TINY = CompileConfig(model="helpers.hostile:Tiny")
TOML = b'O = 1\nbatch = [1, 8]\nfidelity = "relc<=0.1"\nseconds = 2.0\n[model-args]\ndepth = 4\n'
ARGUMENTS = b'{"width": 4, "depth": 1, "names": ["a", "b"], "inner": {"scale": 0.5}}'
SAMPLES = ("arrays.npz", "packed.npz", "samples.pt")
# Crafted files that no reader may accept, whatever else is right about them.
KINDS = ("two readings", "code", "memory", "chain", "views", "tuples", *BOMB_FORMATS)
NEVER_READ = tuple(f"crafted {kind}" for kind in KINDS)

Maker = Callable[[bytes, random.Random], bytes]


class Case(NamedTuple):
    """A hostile file: its kind, what reads it, and its size in bytes."""

    kind: str
    read: Callable[[], object]
    size: int


def main() -> None:
    """Read the files, count what happens, write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    largest, failures = 0, []
    with tempfile.TemporaryDirectory() as name:
        folder, marker = Path(name), Path(name) / "ran"
        for number, case in enumerate(cases(folder, marker, options.files, options.seed)):
            idle = run(lambda: None)[2]  # a child begins with the memory of its parent, which grows
            code, problems, peak = run(case.read)
            growth = max(peak - idle, 0)
            if growth > MAX_RATIO * case.size + BASE:
                problems.append("memory")
            if code == 0 and case.kind.startswith(NEVER_READ):
                problems.append("accepted")
            if marker.exists():
                problems.append("ran")
                marker.rmdir()
            outcome = "failed" if problems else "refused" if code else "read"
            largest = max(largest, growth)
            counts[outcome] += 1
            kinds.setdefault(case.kind, Counter())[outcome] += 1
            if problems:
                failures.append({"number": number, "kind": case.kind, "code": code, "problems": problems})
                print(failures[-1], flush=True)
    print(dict(counts), f"largest growth {largest / 2**20:.0f} MiB")
    facts = {"files": sum(counts.values()), "counts": counts, "kinds": kinds, "failures": failures}
    limits = {"largest_growth_bytes": largest, "base_bytes": BASE, "ratio": MAX_RATIO, "seconds": TIME_LIMIT}
    write_json(RESULTS, {**facts, **limits, "environment": environment(options.seed)})
    raise SystemExit(1 if failures else 0)


def run(read: Callable[[], object]) -> tuple[int, list[str], int]:
    """Read a file in a process of its own.

    Returns:
        Its exit code, negative for a signal; what is wrong with how it ended; its peak of memory in bytes.
    """
    with tempfile.TemporaryFile() as output:
        process = os.fork()
        if process == 0:
            child(read, output.fileno())
        _, status, usage = os.wait4(process, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    problems = [] if code in (0, 1) else ["time" if code == -signal.SIGALRM else "exit code"]
    lines = text.splitlines()
    one_line = len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: ")
    if not (one_line if code == 1 else code == 0 and not lines):
        problems.append("lines")
    if "Traceback" in text:
        problems.append("traceback")
    return code, problems, usage.ru_maxrss * 1024


def child(read: Callable[[], object], output: int) -> None:
    """Read, show errors as the command does, and end."""
    code = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.alarm(TIME_LIMIT)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            with exit_codes():
                read()
            code = 0
        except BaseException as error:
            code = getattr(error, "exit_code", 70)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)  # never back into the loop of the parent


def cases(folder: Path, marker: Path, count: int, seed: int) -> Iterator[Case]:
    """Yield crafted files, and as many damaged ones as are missing to the count."""
    rng = random.Random(seed)
    (folder / "whole").mkdir()
    whole = whole_files(folder / "whole")
    whole["model.onnx"] = onnx_model(folder / "whole" / "model.onnx", chain(3))
    whole |= {"options.toml": TOML, "arguments.json": ARGUMENTS}
    compiled = compile_small(folder)
    crafted = list(crafted_files(folder, marker, whole))[:count]
    for name, data in crafted:
        yield case_of(folder, f"crafted {name}", name.split(" ")[-1], data)
    for number in range(count - len(crafted)):
        if number % 8 == 0:
            yield damaged_folder(folder, compiled, rng)
            continue
        name = rng.choice(list(whole))
        yield case_of(folder, name, name, rng.choice(makers(name))(whole[name], rng))


def case_of(folder: Path, kind: str, name: str, data: bytes) -> Case:
    """Write a file, and say how a command reads one of its name."""
    path = folder / name
    path.write_bytes(data)

    def read() -> object:
        if name in SAMPLES:
            return load_samples(path)
        if path.suffix == ".toml":
            return CompileConfig.from_toml(path)
        if path.suffix == ".json":
            return read_arguments(str(path))
        loaded = load_model(path, TINY if "weights" in name or "legacy" in name else None)
        if path.suffix == ".onnx":
            check_memory(loaded.module, Samples({"v0": torch.rand(2, 4)}))
        return loaded

    return Case(kind, read, len(data))


def makers(name: str) -> tuple[Maker, ...]:
    """Return ways to damage a file of a name."""
    if name.endswith(".safetensors"):
        return (*DAMAGE, damage_header, damage_header)
    if name.endswith(".pt2"):
        return (*DAMAGE, damage_member, damage_graph, damage_graph, swap_members, ambiguous)
    if name.endswith(".json"):
        return (*DAMAGE, damage_json, damage_json)
    if name == "legacy.pt" or name.endswith((".onnx", ".toml")):
        return DAMAGE
    return (*DAMAGE, damage_member, damage_member, swap_members, ambiguous)


def ambiguous(data: bytes, rng: random.Random) -> bytes:
    """Make an archive that can be read in two ways."""
    return rng.choice(AMBIGUOUS)(data)


def compile_small(folder: Path) -> Path:
    """Compile a folder to tamper with."""
    path = write_checkpoint(folder / "small.pt", iterations=2)
    options: dict[str, Any] = {"level": 1, "fidelity": ("agreement>=0",), "batches": (1,), "seconds": 0.05}
    compile_model(path, CompileConfig(out=folder / "compiled", threads=1, **options))
    return folder / "compiled"


def damaged_folder(folder: Path, compiled: Path, rng: random.Random) -> Case:
    """Make a folder of which one file is damaged or replaced; its manifest fits in half of the cases."""
    target = folder / "tampered"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(compiled, target)
    path = rng.choice(sorted(target.iterdir()))
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_bytes(damage_json(path.read_bytes(), rng))
    elif rng.random() < 0.8:
        path.write_bytes(rng.choice(DAMAGE)(path.read_bytes(), rng))
    else:
        path.unlink()
        rng.choice((os.mkfifo, lambda p: os.symlink("/dev/zero", p), os.mkdir, lambda p: None))(path)
    if path.name != "manifest.json" and rng.random() < 0.5:
        relist(target)
    size = sum(entry.stat().st_size for entry in target.iterdir() if entry.is_file())
    return Case("folder", lambda: read_folder(target), size)


def crafted_files(folder: Path, marker: Path, whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield files that would run code, take memory or never end; the last word of a name is the file's."""
    scratch = folder / "scratch.bin"
    for kind, write in BOMB_FORMATS.items():
        write(scratch, {"x": Bomb(marker)})
        yield from ((f"{kind} {name}", scratch.read_bytes()) for name in ("checkpoint.pt", "weights.pt", "samples.pt"))
    archives = [name for name, data in whole.items() if data.startswith(b"PK")]
    yield from (("two readings " + name, change(whole[name])) for name in archives for change in AMBIGUOUS)
    for number, text in enumerate(deep_texts()):
        yield f"deep {number} arguments.json", text
        yield f"deep {number} options.toml", b"slices = " + text
        yield f"deep {number} table options.toml", b"model-args = {a = " + text + b"}"
    for line in (b'model = "os:system"', b"unsafe-load = true", b'"unsafe_load" = true'):
        yield "code options.toml", line
    yield from (("memory model.onnx", onnx_model(scratch, nodes, **sizes)) for nodes, sizes in greedy())
    yield "chain model.onnx", onnx_model(scratch, chain(20_000))
    for shape in ((2**40,), (2**31, 2**31), (0,), (2**20,) * 8):
        with zipfile.ZipFile(scratch, "w") as archive, archive.open("x.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": shape})
        yield "claim arrays.npz", scratch.read_bytes()
    for view in (torch.zeros(1).expand(2**28), torch.zeros(1).expand(2**14, 2**14)):
        torch.save({f"x{i}": view for i in range(40)}, scratch)
        yield from (("views " + name, scratch.read_bytes()) for name in ("samples.pt", "weights.pt"))
    header = {f"w{i}": {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]} for i in range(40)}
    text = json.dumps(header).encode()
    yield "claim weights.safetensors", len(text).to_bytes(8, "little") + text
    yield "tuples samples.pt", pickle_of(b"(" * 10**6 + b"t" * 10**6)
    yield "tuples weights.pt", pickle_of(b")" + b"\x85" * 10**6)


def deep_texts() -> Iterator[bytes]:
    """Yield values of JSON and TOML that nest deeply or are long."""
    yield b"[" * 3000 + b"]" * 3000
    yield b"[" * 150 + b"]" * 150
    yield b"1" * 100_000
    yield b"0x1" + b"0" * 100_000
    yield b"-" + b"9" * 4000
    yield b'{"a": ' * 3000 + b"1" + b"}" * 3000
    yield b'"' + b"x" * 10**6 + b'"'
    yield b"1e99999"


def pickle_of(body: bytes) -> bytes:
    """Make a pickle in an archive of torch."""
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("whole/data.pkl", b"\x80\x02" + body + b".")
            archive.writestr("whole/version", b"3\n")
        file.seek(0)
        return file.read()


def chain(length: int) -> list[Any]:
    """Make nodes in a row, from v0 to the last."""
    return [helper.make_node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(length)]


def greedy() -> Iterator[tuple[list[Any], dict[str, list[int]]]]:
    """Yield nodes that make forty constants of a gigabyte and more, and the sizes that these read."""
    for kind, inputs in (("ConstantOfShape", ["size"]), ("Expand", ["one", "size"]), ("Tile", ["one", "size"])):
        nodes = []
        for i in range(40):
            nodes.append(helper.make_node(kind, inputs, [f"c{i}"]))
            nodes.append(helper.make_node("Cast", [f"c{i}"], [f"f{i}"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("ReduceSum", [f"f{i}"], [f"r{i}"]))
            nodes.append(helper.make_node("Add", [f"v{i}", f"r{i}"], [f"v{i + 1}"]))
        yield nodes, {"size": [2**28], "one": [1]}


def onnx_model(path: Path, nodes: list[Any], **constants: list[int]) -> bytes:
    """Make an ONNX file of nodes that lead from v0 to the output of the last."""
    stored = [helper.make_tensor(n, TensorProto.INT64, [len(v)], v) for n, v in constants.items()]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in ("v0", nodes[-1].output[0])]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path.read_bytes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
