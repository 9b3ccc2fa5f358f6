"""A compiled model on KServe's server, as `asapc package --image` packages it, under load: answers, memory, latency.

    asapc compile models/digits.pt --target onnx
    python -m venv serving
    serving/bin/pip install --require-hashes --requirement asapc/serving/templates/requirements.txt
    python -m benchmarks.serving digits.asap --server serving

Beside it, served in the same way: the teacher, the exact form and softmax, and the compiled model without dynamic
batching. All servers run; the clients, threads of this process, send a share of the requests over gRPC to one, then to
the next, in blocks. Rivals, of which throughput alone is asked, get a tenth of the requests. Every answer is compared
with that of `asapc.load`, within 1e-4, and counted. Memory is that of the server's process: after a tenth of the
requests it should not grow. Writes benchmarks/results/serving.json, and what stands in docs/serving.md between the two
markers. Run from the root of a checkout.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as client
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

import asapc
from asapc.commands.bench import BenchOptions, export_those
from asapc.commands.folders import Folder
from asapc.config import CompileConfig
from asapc.runtime.kserve import SETTINGS
from asapc.serving.image import package_image
from asapc.serving.image_smoke import find_python, running_image
from asapc.serving.smoke import TOLERANCE
from asapc.timing.machine import Watch, warn_of_load
from asapc.timing.ratios import paired_ratio
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.generated import replace_generated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # makes a manifest fit, as tests do

from helpers.folders import relist  # noqa: E402

RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "serving.json", ROOT / "docs" / "serving.md"
RIVALS = ("teacher", "exact", "softmax")
COMPILED, UNBATCHED, NAME = "compiled", "compiled, no batching", "model"
BLOCKS, WARM_UP, SAMPLE_SECONDS = 20, 0.1, 0.1
SHARE = 0.1  # of the requests, to each rival
PERCENTILES = (50, 90, 99, 99.9)

Arrays = Mapping[str, np.ndarray]
Row = dict[str, Any]


@dataclass
class Served:
    """A server, what it should answer to each sample, and what it did."""

    address: str
    process: psutil.Process
    samples: list[Arrays]
    expected: list[Arrays]
    seconds: list[float] = field(default_factory=list)  # of a request, in each block
    latencies: list[float] = field(default_factory=list)  # milliseconds, of each answer
    memory: list[tuple[int, int]] = field(default_factory=list)  # requests sent by then, bytes
    outcomes: Counter[str] = field(default_factory=Counter)
    sent: int = 0


def main() -> None:
    """Serve all, send the requests, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `asapc compile` wrote")
    parser.add_argument("--server", type=Path, required=True, help="a virtual environment with the requirements")
    parser.add_argument("--requests", type=int, default=50_000, help="to the compiled model's server")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="samples in one request")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folders = variants(options.folder, Path(scratch))
        names = {n: stack.enter_context(served(path, n != UNBATCHED, options)) for n, path in folders.items()}
        for block in range(BLOCKS):
            for name in rotated(list(names), block):
                most = options.requests if name == COMPILED else round(SHARE * options.requests)
                send(names[name], most * (block + 1) // BLOCKS, options.clients)
            print(f"block {block + 1} of {BLOCKS}", flush=True)
    rows = {name: row(one, names[COMPILED]) for name, one in names.items()}
    for name, of_name in rows.items():
        print(name, json.dumps(of_name), flush=True)
    version = "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in ('kserve', 'onnxruntime')))"
    packages = subprocess.check_output([find_python(options.folder, options.server), "-c", version], text=True)
    data = {
        "environment": environment(seed=0),
        "server": packages.strip(),
        "protocol": "grpc",
        "model": options.folder.name,
        "requests": options.requests,
        "clients": options.clients,
        "batch": options.batch,
        "cores": watch.conditions.cores,
        "warnings": warn_of_load(watch.conditions),
        "servers": rows,
    }
    write_json(options.out, data)
    if options.out == RESULTS:
        replace_generated(DOCUMENT, table(data))


def variants(path: Path, scratch: Path) -> dict[str, Path]:
    """Return a folder for each model, by its name: the compiled one, and copies that hold its rivals' files."""
    folder = Folder.at(path)
    samples = folder.samples(None)
    files = export_those(BenchOptions(RIVALS), folder, samples, scratch, CompileConfig(), lambda event: None)
    folders = {COMPILED: path, UNBATCHED: path}
    for name, file in files.items():
        folders[name] = scratch / f"{name}.asap"
        shutil.copytree(path, folders[name])
        for data in file.parent.glob(f"{file.name}.data"):
            shutil.copyfile(data, folders[name] / data.name)
        shutil.copyfile(file, folders[name] / "model.onnx")
        relist(folders[name])
    return folders


@contextmanager
def served(path: Path, batching: bool, options: argparse.Namespace) -> Iterator[Served]:
    """Serve a folder until the end of the block."""
    held_out = {name: value.numpy() for name, value in Folder.at(options.folder).samples(None).inputs.items()}
    starts = range(0, len(next(iter(held_out.values()))) - options.batch + 1, options.batch)
    samples = [{name: value[start : start + options.batch] for name, value in held_out.items()} for start in starts]
    with asapc.load(path, "cpu", 1) as model:
        expected = [model(sample) for sample in samples]
    with tempfile.TemporaryDirectory() as temporary:
        image = Path(temporary) / "image"
        package_image(path, image, NAME)
        if not batching:
            settings = (image / SETTINGS).read_text()
            (image / SETTINGS).write_text(re.sub("^batch = .*", "batch = 1", settings, flags=re.MULTILINE))
        with running_image(image, NAME, options.server) as (addresses, process):
            yield Served(addresses["grpc"], psutil.Process(process.pid), samples, expected)


def rotated(names: list[str], block: int) -> list[str]:
    """Return the names in another order for each block, so that none always follows the same one."""
    return names[block % len(names) :] + names[: block % len(names)]


def send(one: Served, until: int, clients: int) -> None:
    """Send requests until there were so many, from that many clients at once; compare and count."""
    numbers, done = iter(range(one.sent, until)), threading.Event()
    turn = threading.Lock()

    def take() -> int | None:
        with turn:
            return next(numbers, None)

    def ask() -> None:
        with client.InferenceServerClient(one.address) as connection:
            while (number := take()) is not None:
                index = number % len(one.samples)
                began = time.perf_counter()
                try:
                    outputs = infer(connection, one.samples[index], list(one.expected[index]))
                except InferenceServerException as error:
                    one.outcomes[str(error)[:200]] += 1
                    continue
                one.latencies.append(1000 * (time.perf_counter() - began))
                one.outcomes["equal" if equal(outputs, one.expected[index]) else "different"] += 1

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            one.memory.append((sum(one.outcomes.values()), one.process.memory_info().rss))

    began = time.perf_counter()
    with ThreadPoolExecutor(clients + 1) as pool:
        sampling = pool.submit(sample)
        for asking in [pool.submit(ask) for _ in range(clients)]:
            asking.result()
        one.seconds.append((time.perf_counter() - began) / (until - one.sent))
        done.set()
        sampling.result()
    one.memory.append((sum(one.outcomes.values()), one.process.memory_info().rss))
    one.sent = until


def infer(connection: Any, sample: Arrays, names: list[str]) -> dict[str, np.ndarray]:
    """Return the outputs for a sample by name."""
    values = []
    for name, array in sample.items():
        values.append(client.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        values[-1].set_data_from_numpy(array)
    result = connection.infer(NAME, values)
    return {name: result.as_numpy(name) for name in names}


def equal(outputs: Arrays, expected: Arrays) -> bool:
    """Return whether outputs are those of `asapc.load`, up to rounding in batches of other sizes."""
    return all(np.allclose(outputs[name], value, TOLERANCE, TOLERANCE) for name, value in expected.items())


def row(one: Served, compiled: Served) -> Row:
    """Return what a server did."""
    ratio = paired_ratio(np.array(one.seconds)[:, None], np.array(compiled.seconds)[:, None])
    warm = [memory for sent, memory in one.memory if sent >= WARM_UP * one.sent]
    tenth = max(1, len(warm) // 10)
    first, last = np.median(warm[:tenth]), np.median(warm[-tenth:])
    return {
        "sent": one.sent,
        "outcomes": dict(one.outcomes),
        "lost": one.sent - sum(one.outcomes.values()),
        "requests_per_second": BLOCKS / sum(one.seconds),
        "latency_ms": {str(p): float(np.percentile(one.latencies, p)) for p in PERCENTILES},
        "time_over_compiled": asdict(ratio) if one is not compiled else None,
        "memory_mb": {"warm": first / 2**20, "end": last / 2**20, "most": max(warm) / 2**20},
        "memory_growth": last / first - 1,
    }


def table(data: Row) -> Iterator[str]:
    """Yield the lines of the table in the document."""
    yield (
        f"`{data['model']}` on {data['server']}, {data['clients']} clients with requests of {data['batch']} sample, "
        f"{data['environment']['cpu']}, {len(data['cores'])} cores that clients and server share:"
    )
    yield ""
    yield "| served | requests | equal | requests a second | median, ms | 99 %, ms | memory, MB | growth |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, of_name in data["servers"].items():
        latency, memory = of_name["latency_ms"], of_name["memory_mb"]
        yield (
            f"| {name} | {of_name['sent']:,} | {of_name['outcomes'].get('equal', 0):,} "
            f"| {of_name['requests_per_second']:.0f} | {latency['50']:.0f} | {latency['99']:.0f} "
            f"| {memory['end']:.0f} | {of_name['memory_growth']:.1%} |"
        )


if __name__ == "__main__":
    main()
