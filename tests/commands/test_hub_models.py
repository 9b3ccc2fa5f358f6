"""Models of transformers, from wrapped code to ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import hub_models
from helpers.quick import quick_compilation
from helpers.relowering import outputs
from helpers.slow import slow

import asapc
from asapc.config import CompileConfig

MODELS = {
    "Matcher": (hub_models.Matcher, hub_models.matcher_inputs, [(40, "columns")]),
    "Mixer": (hub_models.Mixer, hub_models.mixer_inputs, [(39, "rows")]),
}


@pytest.mark.parametrize("name", [slow("Matcher"), "Mixer"])
def test_the_loop_of_a_public_model_is_found_and_computed_in_onnx_runtime(name, tmp_path):
    build, inputs_of, loops = MODELS[name]
    torch.manual_seed(0)
    module = build().eval()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    np.savez(tmp_path / "samples.npz", **{key: value.numpy() for key, value in inputs_of(32).items()})
    config = CompileConfig(
        out=tmp_path / "out",
        model=f"helpers.hub_models:{name}",
        calib=tmp_path / "samples.npz",
        level=1,
        target="onnx",
        batches=(2,),
        seconds=0.05,
        threads=1,
    )
    with quick_compilation():
        report = asapc.compile(tmp_path / "weights.pt", config=config)
    sites = report.data["sites"]
    assert [(site["half_steps"], site["last"]) for site in sites] == loops
    assert [site["choice"]["operator"] for site in sites] == ["exact"]
    fresh = inputs_of(5)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    computed = session.run(None, {key: value.numpy() for key, value in fresh.items()})
    floating = [torch.from_numpy(value) for value in computed if np.issubdtype(value.dtype, np.floating)]
    for value, expected in zip(floating, outputs(module, fresh), strict=True):
        assert (value - expected).norm() <= 1e-5 * expected.norm()
