"""ONNX files to read, and to run; shared by the tests of their reader and of their module."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from helpers.hostile import Tiny
from torch import nn

from asapc.backends.onnxruntime.splicer import splice_onnx
from asapc.capturing.capture import capture_onnx
from asapc.loading.model import load_model
from asapc.passes.find.evidence import find_with_evidence
from asapc.planning.operators import exact_operator
from asapc.types.samples import Samples
from asapc.types.site import Site


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def to_onnx(path: Path, module: nn.Module, inputs: dict[str, torch.Tensor], legacy: bool = False) -> Path:
    """Write a model as ONNX by one of torch's two exporters, its batch dynamic."""
    args, names = tuple(inputs.values()), list(inputs)
    with quiet():
        if legacy:
            axes = {name: {0: "batch"} for name in names}
            torch.onnx.export(module, args, path, dynamo=False, opset_version=17, input_names=names, dynamic_axes=axes)
        else:
            shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in names)
            torch.onnx.export(module, args, path, dynamo=True, dynamic_shapes=shapes, input_names=names, verbose=False)
    return path


def tiny_file(folder: Path, name: str = "tiny.onnx", legacy: bool = True) -> Path:
    torch.manual_seed(0)
    return to_onnx(folder / name, Tiny().eval(), {"x": torch.rand(2, 3, 4)}, legacy)


def looped(folder: Path, turns: int, text: str = "") -> Path:
    """Attention whose Sinkhorn loop is a Loop of ONNX."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        looped (float[batch, 6, 4] x) => (float[batch, 6, 4] y)
        <int64 turns = {{{turns}}}, bool go = {{1}}>
        {{
            k = Transpose <perm = [0, 2, 1]> (x)
            scores = MatMul (x, k)
            {text}
            done = Loop (turns, go, scores) <body = body (int64 i, bool c, float[batch, 6, 6] p)
                => (bool c2, float[batch, 6, 6] p2)
                {{ a = LogSoftmax <axis = -1> (p)
                   p2 = LogSoftmax <axis = -2> (a)
                   c2 = Identity (c) }}>
            plan = Exp (done)
            y = MatMul (plan, x)
        }}""")
    onnx.save(model, folder / "looped.onnx")
    return folder / "looped.onnx"


def run_ort(path: Path, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def replaced(path: Path, inputs: dict[str, torch.Tensor]) -> tuple[Sequence[Site], Path]:
    """The sites of a file, and a file beside it in which the exact operator stands for them."""
    samples = Samples(inputs)
    loaded = load_model(path)
    graph = capture_onnx(loaded, samples)
    sites = find_with_evidence(graph, samples).sites
    operators = {site.name: exact_operator(site) for site in sites}
    return sites, splice_onnx(loaded.module, graph, sites, operators, path.with_name("out.onnx"), {}).path
