"""What attention takes in the runtimes of an NVIDIA GPU: one layer and the digits model, in ONNX Runtime and TensorRT.

    python -m benchmarks.gpu_runtimes --export    # anywhere: writes the graphs to benchmarks/cache/gpu/, in minutes
    python -m benchmarks.gpu_runtimes             # where the GPU is, with those graphs (--only layers: a part)

One layer: 8 heads of 64, random queries, keys and values, as in `benchmarks.attention`; `benchmarks.gpu` compares more
forms in torch. Medians of interleaved runs in one process, each between two events on the GPU, inputs and outputs in
its memory; ONNX Runtime also replays each session as a CUDA graph, without the time that launching takes. TensorRT is
there where one of its flavours is installed that has this GPU for a target. Errors are of outputs, relative to the same
operator in torch in float32 without TF32. Writes benchmarks/results/gpu.json and what stands in docs/gpu.md between the
two markers.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asapc.backends.base import Runner
from asapc.backends.eager.runner import EagerRunner
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.cuda import CudaRunner
from asapc.backends.tensorrt.builder import build_engine
from asapc.backends.tensorrt.loader import start_engine
from asapc.backends.tensorrt.runner import EngineRunner
from asapc.capturing.export import export
from asapc.commands.study import study
from asapc.config import CompileConfig
from asapc.errors import AsapcError
from asapc.fidelity.outputs import agreement
from asapc.loading.model import load_model
from asapc.loading.split import gather_samples
from asapc.planning.choose import choose
from asapc.planning.costs import shipped
from asapc.planning.operators import operators, rivals
from asapc.types.engine import EngineOptions
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from asapc.writing.rewrite import rewrite
from benchmarks.attention import inputs, medians, modules
from benchmarks.generated import replace_generated

ROOT = Path(__file__).resolve().parent
RESULTS, GRAPHS = ROOT / "results" / "gpu.json", ROOT / "cache" / "gpu"
DOCUMENT, MODEL = ROOT.parent / "docs" / "gpu.md", ROOT.parent / "models" / "digits.pt"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
BATCHES = {256: 8, 1024: 8, 4096: 2}  # by the length
FORMS = (
    *("teacher", "softmax, fused", "softmax", "exact 40", "truncated 3", "hinges, 3", "parabolas, 3", "parabolas, 5"),
    *("8 slices, 3", "parabolas, 2, fused", "parabolas, 4, fused"),
    *("hinges, 1", "parabolas, 1, fused", "hinges, 1, fused"),
)
# By what is appended to a form's name.
WAYS = {"": "launched", ", graph": "replayed as a CUDA graph", ", torch": "in torch", ", TensorRT": "in TensorRT"}
IN_TORCH = ("teacher", "softmax, fused", "exact 40", "hinges, 3")
COMPILED, COMPILED_LENGTH = ("exact 40", "truncated 3", "hinges, 3", "parabolas, 2, fused"), 1024
MODEL_BATCHES = (1, 32, 500)
VARIANTS = ("teacher", "exact", "truncated", "softmax", "compiled")
SECONDS, MIN_ROUNDS = 3.0, 10
Row = dict[str, Any]


def engine_runner(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[EngineRunner, Samples]:
    """Return a layer as a TensorRT engine for the GPU at hand, and its inputs as it takes them.

    Raises:
        AsapcError: there is no TensorRT for this GPU, or it refuses the layer.
    """
    samples = Samples(dict(zip("qkv", inputs, strict=True)))
    two = moved(Samples({name: torch.cat([value[:1]] * 2) for name, value in samples.inputs.items()}), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        graph = CapturedGraph(export(copy.deepcopy(module).cpu(), two.inputs), two)
        onnx = export_onnx(graph, Path(folder) / "layer.onnx", {}, standard=True)
        here = "SM{}{}".format(*torch.cuda.get_device_capability())
        engine = build_engine(onnx, Path(folder) / "layer.engine", len(samples), options=EngineOptions((here,)))
        return start_engine(engine), samples


class TorchRunner(EagerRunner):
    """A module in torch, until the GPU is done; inputs by position, as compiled modules lose the names."""

    def __call__(self, samples: Samples) -> list[Tensor]:
        """Return the output."""
        with torch.no_grad():
            output = self.module(*samples.inputs.values())
        torch.cuda.synchronize()
        return [output]

    def time(self, samples: Samples) -> float:
        """Return the milliseconds between two events on the GPU."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.no_grad():
            start.record()
            self.module(*samples.inputs.values())
            end.record()
        end.synchronize()
        return start.elapsed_time(end)


def main() -> None:
    """Measure what is asked for, keep the rest of the JSON, render the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", action="store_true", help="write the graphs, measure nothing")
    parser.add_argument("--only", choices=("layers", "compiled", "models", "render"))
    options = parser.parse_args()
    if options.export:
        GRAPHS.mkdir(parents=True, exist_ok=True)
        export_layers()
        export_models()
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    data: Row = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for part, rows in {"layers": layers, "compiled": compiled_layers, "models": whole_models}.items():
        if options.only in (None, part):
            data[part] = list(rows())
            data["environment"] = environment(seed=0)
            write_json(RESULTS, data)
    replace_generated(DOCUMENT, document(data))


def moved(samples: Samples, device: str, dtype: torch.dtype | None = None) -> Samples:
    """Return the same on another device, or in another precision too."""
    return Samples({name: value.to(device, dtype) for name, value in samples.inputs.items()})


def export_layers() -> None:
    """Write every form of one layer, at every length and in both precisions."""
    by_form = modules()
    for length in BATCHES:
        for name, dtype in DTYPES.items():
            samples = moved(inputs(2, length), "cpu", dtype)
            for form in FORMS:
                graph = CapturedGraph(export(by_form[form].eval(), samples.inputs), samples)
                export_onnx(graph, layer_path(form, length, name), {})
        print(f"exported N = {length}", flush=True)


def layer_path(form: str, length: int, dtype: str) -> Path:
    """Return the file of a form of one layer."""
    return GRAPHS / f"{form.replace(', ', '_').replace(' ', '_')}.{length}.{dtype}.onnx"


def export_models() -> None:
    """Write the digits model as compiled with the defaults, and what it is compared with, in both precisions."""
    teacher = study(MODEL)
    graph, sites = teacher.graph, teacher.sites
    selection = choose(teacher, CompileConfig(), shipped())
    variants = {
        **rivals(sites, selection, max(CompileConfig().batches), shipped()),
        "compiled": operators(sites, selection),
    }
    for name, of_sites in variants.items():
        for precision, dtype in DTYPES.items():
            export_onnx(rewrite(graph, sites, of_sites, dtype), model_path(name, precision), {}, standard=True)


def model_path(name: str, dtype: str) -> Path:
    """Return the file of a variant of the digits model."""
    return GRAPHS / f"digits_{name}.{dtype}.onnx"


def milliseconds(runners: Mapping[str, Runner], samples: Samples) -> dict[str, float]:
    """Return the medians by name."""
    return medians(runners, samples, len(samples), SECONDS, MIN_ROUNDS)


def relative(output: Tensor, reference: Tensor) -> float:
    """Return the difference of an output, relative."""
    return ((output.float() - reference).norm() / reference.norm()).item()


def layers() -> Iterator[Row]:
    """Yield one layer in ONNX Runtime, launched and replayed, and in torch, at every length and precision."""
    for length in BATCHES:
        for name in DTYPES:
            row = layer(length, name)
            torch.cuda.empty_cache()
            print(length, name, {key: round(ms, 3) for key, ms in row["ms"].items()}, flush=True)
            yield row


def layer(length: int, name: str) -> Row:
    """Return all forms of one layer at one length, in the precision of a name."""
    batch = BATCHES[length]
    samples = moved(inputs(batch, length), "cuda", DTYPES[name])
    wide = moved(samples, "cuda", torch.float32)
    runners: dict[str, Runner] = {}
    errors: dict[str, float] = {}
    by_form = modules()
    for form in FORMS:
        module = by_form[form].eval().cuda()
        (reference,) = TorchRunner(module)(wide)
        launched = CudaRunner(layer_path(form, length, name), samples)
        of_form: dict[str, Runner] = {
            form: launched,
            f"{form}, graph": CudaRunner(layer_path(form, length, name), samples, launched(samples)),
        }
        if form in IN_TORCH:
            of_form[f"{form}, torch"] = TorchRunner(module)
        try:
            of_form[f"{form}, TensorRT"] = engine_runner(module, list(samples.inputs.values()))[0]
        except AsapcError as error:
            print(f"{form}, {name}, N = {length}: no TensorRT: {error}", flush=True)
        for label, runner in of_form.items():
            for _ in range(3):  # a graph is captured in the first runs
                (output,) = runner(samples)
            errors[label] = relative(output.cuda(), reference)
        runners |= of_form
    return {"length": length, "dtype": name, "batch": batch, "errors": errors, "ms": milliseconds(runners, samples)}


def compiled_layers() -> Iterator[Row]:
    """Yield one layer through torch.compile, beside torch's own fused attention."""
    for name, dtype in DTYPES.items():
        batch = BATCHES[COMPILED_LENGTH]
        samples = moved(inputs(batch, COMPILED_LENGTH), "cuda", dtype)
        by_form = modules()
        runners: dict[str, Runner] = {"softmax, fused": TorchRunner(by_form["softmax, fused"].eval().cuda())}
        for form in COMPILED:
            torch._dynamo.reset()
            compiled: Any = torch.compile(by_form[form].eval().cuda(), dynamic=False)
            runners[form] = TorchRunner(compiled)
        row = {"length": COMPILED_LENGTH, "dtype": name, "batch": batch, "ms": milliseconds(runners, samples)}
        print("torch.compile", row, flush=True)
        yield row


def whole_models() -> Iterator[Row]:
    """Yield the digits model: every variant at every batch, and whether it answers as the teacher does."""
    held_out = gather_samples(load_model(MODEL), CompileConfig())[1]
    (reference,) = CudaRunner(model_path("teacher", "float32"), moved(held_out, "cuda"))(held_out)
    for batch in MODEL_BATCHES:
        samples = moved(held_out[:batch], "cuda")
        runners: dict[str, Runner] = {}
        row: Row = {"batch": batch, "agreement": {}, "logits": {}}
        for dtype in DTYPES:
            for variant in VARIANTS:
                path, name = model_path(variant, dtype), f"{variant}, {dtype}"
                launched = CudaRunner(path, samples)
                outputs = launched(samples)
                runners |= {name: launched, f"{name}, graph": CudaRunner(path, samples, outputs)}
                row["agreement"][name] = agreement(reference[:batch], outputs[0], labelled=True)
                row["logits"][name] = relative(outputs[0], reference[:batch])
        row["ms"] = milliseconds(runners, samples)
        print(row, flush=True)
        yield row


def document(data: Row) -> Iterator[str]:
    """Yield the tables."""
    environment = data["environment"]
    packages = environment["packages"]
    runtimes = ", ".join(f"{name} {packages[name]}" for name in ("torch", "onnxruntime-gpu") if name in packages)
    yield f"{environment['gpus'][0]}, {runtimes}."
    yield ""
    for dtype in DTYPES:
        rows = [row for row in data.get("layers", []) if row["dtype"] == dtype]
        if not rows:
            continue
        heads = [f"N = {row['length']}, batch {row['batch']}" for row in rows]
        ways = [way for way in WAYS if any(form + way in row["ms"] for row in rows for form in FORMS)]
        yield f"One layer, {dtype}, ms: {' / '.join(WAYS[way] for way in ways)}"
        yield ""
        yield "| | " + " | ".join(heads) + " | largest error |"
        yield "|" + "---|" * (len(heads) + 2)
        for form in FORMS:
            names = [form + way for way in ways]
            if not any(name in row["ms"] for row in rows for name in names):
                continue
            cells = [" / ".join(cell_times(row["ms"], names)) for row in rows]
            largest = max(row["errors"][name] for row in rows for name in names if name in row["errors"])
            yield f"| {form} | " + " | ".join(cells) + f" | {largest:.1e} |"
        yield ""
    for row in data.get("compiled", []):
        times = ", ".join(f"{name} {ms:.2f}" for name, ms in row["ms"].items())
        yield f"Through torch.compile (softmax as it is), N = {row['length']}, {row['dtype']}, ms: {times}."
        yield ""
    if models := data.get("models"):
        yield "The digits model, ms: launched / replayed as a CUDA graph"
        yield ""
        yield "| | " + " | ".join(f"batch {row['batch']}" for row in models) + " | agreement | logits, relative |"
        yield "|" + "---|" * (len(models) + 3)
        for name in models[0]["agreement"]:
            cells = [f"{row['ms'][name]:.2f} / {row['ms'][f'{name}, graph']:.2f}" for row in models]
            facts = f"{models[-1]['agreement'][name]:.3f} | {models[-1]['logits'][name]:.1e}"
            yield f"| {name} | " + " | ".join(cells) + f" | {facts} |"
        yield ""


def cell_times(ms: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """Return times by their names, with a dash for one that is missing before another."""
    last = max((number for number, name in enumerate(names) if name in ms), default=-1)
    return [f"{ms[name]:.2f}" if name in ms else "-" for name in names[: last + 1]]


if __name__ == "__main__":
    main()
