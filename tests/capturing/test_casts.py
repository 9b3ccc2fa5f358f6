"""Models with automatic casts in their forward are captured without, with a note that says so."""

import functools
import math

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.command import assert_user_error, run
from helpers.quick import quick_compilation
from helpers.stopping import captured, lines_with
from helpers.tolerances import difference
from torch import nn
from torch.utils._pytree import tree_leaves

import asapc
from asapc.config import CompileConfig
from asapc.errors import FidelityError
from asapc.types.samples import Samples

BFLOAT16 = 2.0**-6  # its rounding, a few times over
TOKENS, WIDTH, HEADS = 12, 16, 2


class Sinkhorn(nn.Module):
    """Sinkhorn attention with a norm before and a head behind."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 4)

    def attend(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        plan = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).exp()
        for _ in range(4):
            plan = plan / plan.sum(-2, keepdim=True)
            plan = plan / plan.sum(-1, keepdim=True)
        return self.head((plan.to(v.dtype) @ v).transpose(1, 2).flatten(2)).mean(1)


class Region(Sinkhorn):
    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):  # region
            return self.attend(x)


class Nested(Sinkhorn):
    def forward(self, x):
        with torch.amp.autocast("cpu"):  # nested
            with torch.autocast("cpu", enabled=False):
                x = x * 2.0
            return self.attend(x / 2)


class Decorated(Sinkhorn):
    @torch.autocast("cpu", dtype=torch.bfloat16)  # decorated
    def forward(self, x):
        return self.attend(x)


class Deprecated(Sinkhorn):
    def forward(self, x):
        with torch.cpu.amp.autocast():  # deprecated
            return self.attend(x).float()


class Kept(Sinkhorn):
    def __init__(self):
        super().__init__()
        self.region = torch.autocast("cpu", dtype=torch.float16)

    def forward(self, x):
        with self.region:  # kept
            return self.attend(x)


class Disabled(Sinkhorn):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.attend(x)


class OfGpu(Sinkhorn):
    """Casts on a GPU only, which is not where asapc runs models."""

    def forward(self, x):
        with torch.autocast("cuda", dtype=torch.float16):
            return self.attend(x)


class Mixing(Sinkhorn):
    """Casts by itself what automatic casts would have brought to one type again."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # mixing
            return self.qkv(self.norm(x).to(torch.bfloat16))  # product


def samples(count: int = 24) -> Samples:
    return Samples({"x": torch.randn(count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [Region, Nested, Decorated, Deprecated, Kept])
def test_automatic_casts_are_left_out_and_their_place_is_noted(kind):
    torch.manual_seed(0)
    module = kind()
    graph = captured(module, samples())
    assert list(graph.casts) == lines_with(f"# {kind.__name__.lower()}", __file__)
    values = tree_leaves([node.meta.get("val") for node in graph.program.graph.nodes])
    assert {value.dtype for value in values if isinstance(value, torch.Tensor)} == {torch.float32}
    x = samples().inputs["x"]
    with torch.no_grad():
        assert difference(graph.program.module()(x), module.attend(x)) < 1e-6
        assert 1e-6 < difference(graph.program.module()(x), module(x).float()) < BFLOAT16


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'", "ignore:CUDA is not available")
@pytest.mark.parametrize("kind", [Disabled, OfGpu])
def test_casts_that_do_nothing_get_no_note(kind):
    assert captured(kind(), samples()).casts == ()


def test_torch_has_its_automatic_casts_again_afterwards():
    module = Region()
    captured(module, samples())
    assert module(samples().inputs["x"]).dtype == torch.bfloat16


def write(folder, kind):
    torch.manual_seed(0)
    module = kind().eval()
    torch.save(module.state_dict(), folder / "weights.pt")
    np.savez(folder / "samples.npz", x=samples().inputs["x"].numpy())
    return module


def test_a_model_with_automatic_casts_is_compiled_and_the_report_measures_what_they_change(tmp_path):
    module = write(tmp_path, Region)
    compiles = functools.partial(asapc.compile, tmp_path / "weights.pt", on_event=(events := []).append)
    options = {
        "model": f"{__name__}:Region",
        "calib": tmp_path / "samples.npz",
        "level": 1,
        "target": "onnx",
        "batches": (1,),
        "threads": 1,
    }
    with quick_compilation():
        report = compiles(config=CompileConfig(out=tmp_path / "out", **options))
    [site] = report.data["sites"]
    assert (site["half_steps"], site["choice"]["operator"]) == (8, "exact")
    [change] = [hop["rel"] for hop in report.data["fidelity"]["hops"] if hop["name"] == "capture"]
    assert 1e-6 < change < BFLOAT16
    summaries = " ".join(str(event) for event in events)
    assert f"captured without the automatic casts of {lines_with('# region', __file__)[0]}" in summaries
    x = samples(5).inputs["x"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert difference(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), module(x).float()) < BFLOAT16
    with quick_compilation(), pytest.raises(FidelityError):
        compiles(config=CompileConfig(out=tmp_path / "exact", fidelity=("output-error<=1e-6",), **options))


def test_a_model_that_needs_its_automatic_casts_is_refused_with_its_line(tmp_path, monkeypatch):
    write(tmp_path, Mixing)
    monkeypatch.chdir(tmp_path)
    message, hint = assert_user_error(
        run("inspect", "weights.pt", "--model", f"{__name__}:Mixing", "--calib", "samples.npz")
    )
    [place], [line] = lines_with("# mixing", __file__), lines_with("# product", __file__)
    assert f"without the automatic casts of {place}" in message
    assert line in message
    assert ".float()" in hint
