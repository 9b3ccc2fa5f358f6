"""Engines are run by a fake GPU (`helpers/fake_gpu.py`), whose interface is compared with that of NVIDIA's packages."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import fake_gpu
from helpers.fake_gpu import Code, FakeContext, FakeCuda, FakeEngine, FakeTensorRT, engine_bytes

from asapc.backends.tensorrt import engine as module
from asapc.backends.tensorrt.cuda import Cuda
from asapc.backends.tensorrt.ports import DTYPES
from asapc.backends.tensorrt.runner import EngineRunner
from asapc.errors import BuildError, DependencyError, SamplesError
from asapc.timing.rounds import measure
from asapc.types.samples import Samples


@pytest.fixture
def gpu(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    fake_gpu.install(monkeypatch, fake)
    return fake


def opened(gpu: FakeCuda, data: bytes | None = None, **options) -> EngineRunner:
    trt = FakeTensorRT(gpu, **options)
    return EngineRunner(trt, engine_bytes() if data is None else data, "model.engine", "tensorrt", Cuda())


def images(batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((batch, 4, 4), dtype=np.float32)


@pytest.mark.parametrize("rtx", [False, True])
def test_outputs_come_by_name_for_every_shape_that_the_engine_takes(rtx, gpu):
    runner = opened(gpu, rtx=rtx)
    assert (list(runner.inputs), runner.outputs, runner.device) == (["images"], ["logits"], "Fake GPU")
    for batch in (1, 3, 8, 3, 1):
        x = images(batch, seed=batch)
        (name, result), *more = runner.run({"images": x}).items()
        assert (name, more, result.dtype) == ("logits", [], np.float32)
        np.testing.assert_array_equal(result, 2 * x)


def test_several_inputs_of_several_types_are_told_apart(gpu):
    inputs = {
        "tokens": {"dtype": "INT64", "low": [1, 3], "high": [4, 3]},
        "scale": {"dtype": "HALF", "low": [1, 3], "high": [4, 3]},
    }
    outputs = {"a": {"dtype": "FLOAT", "shape": ["batch", 3]}, "b": {"dtype": "INT32", "shape": ["batch", 3]}}
    runner = opened(gpu, engine_bytes(inputs, outputs))
    tokens, scale = np.arange(6).reshape(2, 3), np.full((2, 3), 0.5, np.float16)
    result = runner.run({"scale": scale, "tokens": tokens})
    np.testing.assert_array_equal(result["a"], 2 * tokens + 1.0)
    np.testing.assert_array_equal(result["b"], 2 * tokens + 1)
    assert result["b"].dtype == np.int32


def test_an_array_that_is_not_contiguous_is_copied_first(gpu):
    x = images(4)[::2].transpose(0, 2, 1)
    np.testing.assert_array_equal(opened(gpu).run({"images": x})["logits"], 2 * x)


def test_tensorrt_runs_are_captured_once_for_each_shape_and_replayed(gpu):
    runner = opened(gpu)
    for batch in (2, 3, 2, 3, 2):
        runner.run({"images": images(batch)})
    assert gpu.log.count("launch") == 4  # to run, and to capture, for two shapes
    assert gpu.log.count("cudaGraphLaunch") == 3
    assert runner.note == ""
    # Each graph was captured on a context of its own, and one more told the outputs' largest shapes.
    assert runner.trt.contexts == 3


def test_tensorrt_rtx_captures_by_itself(gpu):
    runner = opened(gpu, rtx=True)
    for _ in range(3):
        runner.run({"images": images()})
    assert gpu.log.count("launch") == 3
    assert "cudaStreamBeginCapture" not in gpu.log
    assert runner.trt.configs  # in which the fake looks for the strategy


@pytest.mark.parametrize("function", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", None])
def test_where_a_graph_cannot_be_captured_runs_are_launched_and_the_note_says_why(function, gpu):
    runner = opened(gpu)
    if function is None:
        runner.trt.uncapturable = True
    else:
        gpu.refuse[function] = Code.cudaErrorStreamCaptureUnsupported
    for _ in range(3):
        np.testing.assert_array_equal(runner.run({"images": images()})["logits"], 2 * images())
    assert "cudaGraphLaunch" not in gpu.log
    assert runner.note.startswith("launched, without a CUDA graph: ")
    assert ("cannot do this" if function is None else function) in runner.note
    assert gpu.graphs == 0


def test_shapes_that_were_not_used_for_longest_make_room(gpu, monkeypatch):
    monkeypatch.setattr(module, "MAX_SESSIONS", 2)
    runner = opened(gpu)
    for batch in (1, 2, 1, 3):
        runner.run({"images": images(batch)})
    assert [key[0][0] for key in runner.sessions] == [1, 3]
    assert gpu.graphs == 2


def test_memory_is_allocated_once_and_given_back(gpu):
    runner = opened(gpu)
    before = gpu.log.count("cudaMalloc")
    for batch in (1, 8, 2):
        runner.run({"images": images(batch)})
        runner.milliseconds({"images": images(batch)})
    assert gpu.log.count("cudaMalloc") == before == 3  # of the contexts, the input and the output
    assert gpu.events == 0
    runner.close()
    assert (gpu.memory, gpu.graphs) == ({}, 0)


def test_time_is_that_between_two_events_around_one_run(gpu):
    runner = opened(gpu)
    assert runner.milliseconds({"images": images()}) == 2.0  # the first run, and capturing, are not in it
    gpu.milliseconds = 5.0
    assert runner.milliseconds({"images": images()}) == 5.0


def test_latency_is_measured_by_the_clock_of_the_gpu(gpu):
    gpu.milliseconds = 123.0
    (run,) = measure({"engine": opened(gpu)}, Samples({"images": torch.rand(3, 4, 4)}), 2, 0.0)
    assert (run.p50_ms, run.runtime) == (123.0, "tensorrt")


def test_torch_tensors_in_any_number_are_run_in_parts(gpu):
    inputs = {"images": {"dtype": "FLOAT", "low": [2, 4, 4], "high": [4, 4, 4]}}
    runner = opened(gpu, engine_bytes(inputs))
    for count in (1, 4, 9):
        x = torch.rand(count, 4, 4)
        (result,) = runner(Samples({"images": x, "unread": torch.zeros(count)}))
        assert torch.equal(result, 2 * x)


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"image": images()}, "takes images, and got image"),
        ({"images": images(), "more": images()}, "takes images, and got images, more"),
        (
            {"images": images().astype(np.float64)},
            r"images is float64 \(2, 4, 4\), and .* takes float32 \(1 to 8, 4, 4\)",
        ),
        ({"images": images(9)}, r"images is float32 \(9, 4, 4\)"),
        ({"images": images()[:, :3]}, r"images is float32 \(2, 3, 4\)"),
        ({"images": images()[0]}, r"images is float32 \(4, 4\)"),
        ({}, "takes images, and got "),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_anything_runs(arrays, part, gpu):
    runner = opened(gpu)
    with pytest.raises(SamplesError, match=part):
        runner.run(arrays)
    assert "launch" not in gpu.log


def test_failures_of_tensorrt_and_cuda_are_one_line(gpu):
    with pytest.raises(BuildError, match=r"cannot load model.engine: deserializeCudaEngine: the stream is corrupt"):
        opened(gpu, b"ftrt, but nothing else")
    runner = opened(gpu)
    runner.trt.failing = True
    with pytest.raises(BuildError, match=r"cannot run model.engine: enqueueV3"):
        runner.run({"images": images()})
    runner.close()
    gpu.refuse["cudaMalloc"] = Code.cudaErrorMemoryAllocation
    with pytest.raises(BuildError, match=r"refuses cudaMalloc: cudaErrorMemoryAllocation of 256 bytes") as caught:
        opened(gpu)
    assert "smaller batches" in caught.value.hint
    assert gpu.memory == {}


def test_types_that_numpy_lacks_and_shapes_that_depend_on_data_are_refused(gpu):
    half = {"images": {"dtype": "BF16", "low": [1, 4], "high": [8, 4]}}
    with pytest.raises(BuildError, match=r"images of model.engine is BF16, which numpy lacks"):
        opened(gpu, engine_bytes(half))
    with pytest.raises(BuildError, match=r"the shape of logits of model.engine depends on data"):
        opened(gpu, engine_bytes(outputs={"logits": {"dtype": "FLOAT", "shape": [-1, 4]}}))


def test_threads_take_turns(gpu):
    runner, wrong = opened(gpu), []

    def serve(seed: int) -> None:
        for _ in range(20):
            x = images(1 + seed % 8, seed)
            if not np.array_equal(runner.run({"images": x})["logits"], 2 * x):
                wrong.append(seed)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_without_a_driver_a_gpu_or_the_package_it_is_said_which(monkeypatch):
    fake_gpu.install(monkeypatch, None)
    with pytest.raises(DependencyError, match="needs an NVIDIA GPU with its driver"):
        Cuda()
    fake_gpu.install(monkeypatch, FakeCuda(devices=0))
    with pytest.raises(DependencyError, match="needs an NVIDIA GPU with its driver"):
        Cuda()
    monkeypatch.undo()
    monkeypatch.setattr("asapc.backends.tensorrt.cuda.driver_loads", lambda: True)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(DependencyError, match="cuda-bindings, which is missing") as caught:
        Cuda()
    assert "asapc[gpu]" in caught.value.hint


def test_a_runner_needs_no_torch():
    code = (
        "import sys, asapc.backends.tensorrt.runner, asapc.backends.tensorrt.cuda, asapc.backends.tensorrt.loader; "
        "print([name for name in ('torch', 'tensorrt_rtx', 'onnxruntime', 'cuda') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_fakes_have_no_name_that_the_real_packages_lack():
    trt = pytest.importorskip("tensorrt_rtx")
    pairs = ((FakeContext, trt.IExecutionContext), (FakeEngine, trt.ICudaEngine))
    for fake, real in pairs:
        names = {name for name in vars(fake) if not name.startswith("_")} - {"compute", "array"}
        assert {name for name in names if not hasattr(real, name)} == set()
    assert hasattr(trt.Runtime, "deserialize_cuda_engine")
    assert hasattr(trt.Runtime, "engine_host_code_allowed")
    assert hasattr(trt.IRuntimeConfig, "set_execution_context_allocation_strategy")
    assert hasattr(trt.IRuntimeConfig, "cuda_graph_strategy")
    assert hasattr(trt.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")
    assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(trt.TensorIOMode, "INPUT")
    assert {name for name in DTYPES if not hasattr(trt.DataType, name)} == set()


def test_cudas_runtime_has_every_function_that_the_fake_has():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    functions = [name.removeprefix("do_") for name in vars(FakeCuda) if name.startswith("do_")]
    assert [name for name in functions if not hasattr(runtime, name)] == []
    for kind, real in ((fake_gpu.Kind, "cudaMemcpyKind"), (fake_gpu.Mode, "cudaStreamCaptureMode")):
        assert {member.name: int(member) for member in kind}.items() <= {
            member.name: int(member) for member in getattr(runtime, real)
        }.items()
    assert int(runtime.cudaError_t.cudaSuccess) == 0
