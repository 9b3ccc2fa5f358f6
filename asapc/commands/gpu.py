"""What a compilation does with the GPU at hand: runs the engine, and times it beside ONNX Runtime's CUDA provider."""

from dataclasses import replace
from functools import partial

import torch

from asapc.backends.base import Runner
from asapc.backends.onnxruntime.cuda import CudaRunner
from asapc.backends.tensorrt.loader import start_engine
from asapc.backends.tensorrt.runner import EngineRunner
from asapc.errors import AsapcError, one_line
from asapc.timing.gpu import clocks, settle
from asapc.timing.rounds import measure, milliseconds
from asapc.types.artifacts import EngineResult, OnnxArtifact
from asapc.types.results import GpuLatency, LatencyRun
from asapc.types.samples import Samples


def open_built(result: EngineResult) -> tuple[EngineResult, EngineRunner | None]:
    """Open an engine that was just built; where this machine cannot run it, the result says why."""
    if result.artifact is None:
        return result, None
    try:
        return result, start_engine(result.artifact)
    except AsapcError as error:
        return replace(result, not_run=str(error)), None


def measure_gpu(
    onnx: OnnxArtifact,
    engine: EngineRunner | None,
    samples: Samples,
    batches: tuple[int, ...],
    seconds: float,
    seed: int,
) -> GpuLatency | None:
    """Time the compiled model on the GPU at hand; None without one.

    Args:
        onnx: the file that the engine was built from.
        engine: the engine, where it runs here.
        samples: real inputs.
        batches: samples a call.
        seconds: to spend on each batch size.
        seed: of the order within the rounds.
    """
    if engine is None and not torch.cuda.is_available():
        return None
    before, settled, runs, notes = clocks(), True, list[LatencyRun](), dict[str, None]()
    for batch in batches:
        inputs = samples[[i % len(samples) for i in range(batch)]]
        runners = of_onnx_runtime(onnx, inputs, notes)
        if engine is not None:
            runners["engine"] = engine
        # One after the other here, and interleaved below: each has kernels to choose or to compile.
        rests = [settle(partial(milliseconds, runner, inputs)) for runner in runners.values()]
        settled = settled and all(rests)
        runs += measure(runners, samples, batch, seconds, seed)
    device = torch.cuda.get_device_name() if engine is None else engine.device
    if engine is not None and engine.note:
        notes[f"{engine.name} is {engine.note}"] = None
    of_model = tuple(replace(run, name="compiled", device=device) for run in runs)
    return GpuLatency(device, of_model, settled, (*before, *clocks()), tuple(notes))


def of_onnx_runtime(onnx: OnnxArtifact, inputs: Samples, notes: dict[str, None]) -> dict[str, Runner]:
    """Open an ONNX file in ONNX Runtime's CUDA provider for one batch, launched and replayed as a CUDA graph.

    What cannot be opened is put into `notes`.
    """
    runners: dict[str, Runner] = {}
    try:
        on_gpu = Samples({name: value.to("cuda") for name, value in inputs.inputs.items()})
        launched = CudaRunner(onnx.path, on_gpu)
        outputs = launched(on_gpu)
        runners["launched"] = launched
        replayed = CudaRunner(onnx.path, on_gpu, outputs)
        replayed(on_gpu)
        runners["replayed"] = replayed
    # ONNX Runtime's errors share no base, and an engine that was built is worth more than this comparison.
    except Exception as error:
        reason = str(error) if isinstance(error, AsapcError) else one_line(error)
        notes[f"ONNX Runtime's CUDA provider was not timed{' as a CUDA graph' * bool(runners)}: {reason}"] = None
    return runners
