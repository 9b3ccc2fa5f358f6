"""A report of three sites, made by hand, and arrays for its figures."""

from math import inf
from pathlib import Path

import numpy as np
import torch
from helpers import fitted
from helpers.fitted import changed

from asapc.config import CompileConfig
from asapc.planning.costs import shipped
from asapc.types.artifacts import EngineResult, OnnxArtifact
from asapc.types.budget import Bound, Term, Verdict
from asapc.types.choices import Candidate, Cheaper, Choice, Selection, SlicedDualParams
from asapc.types.graph import EarlyStops
from asapc.types.results import (
    CostCheck,
    Fidelity,
    FittedActivation,
    Hop,
    LatencyRun,
    Metric,
    SiteFidelity,
    VariantFidelity,
)
from asapc.types.samples import Samples
from asapc.types.site import Findings, Miss, Site
from asapc.types.timing import BatchLatency, Conditions, Latency, Ratio
from asapc.writing.environment import environment
from asapc.writing.recipe import command_line, options_data
from asapc.writing.report import report_data

CONDITIONS = Conditions((0, 1), None, 0.1, ())
VARIANTS = {"teacher": 8.0, "exact": 3.0, "truncated": 1.5, "softmax": 1.0, "compiled": 2.0}


def site(name: str, score_scale: list[float]) -> Site:
    heads = len(score_scale)
    one, scale = torch.ones(1, dtype=torch.float64), torch.tensor(score_scale)
    sizes = {"heads": heads, "queries": 64, "keys": 32, "head_dim": 16}
    masses = {"row_mass": one, "column_mass": 2 * one}
    scales = {"scale": scale, "score_scale": scale, "folded": torch.ones(heads)}
    return fitted.site(40, name=name, share=0.123456, **sizes, **masses, **scales)


def matching(name: str) -> Site:
    """A site that ends in a plan, whose scores are no product of queries and keys."""
    return changed(site(name, [1.0, 1.0]), product=None, attention=None, applied=False)


def report() -> dict:
    sites = (site("a", [1.0, 1.0]), site("b", [1.0, 2.0]), matching("c"))
    basis, knots = torch.eye(16).expand(2, -1, -1), torch.zeros(2, 0, 0)
    params = SlicedDualParams(basis, basis, 8, knots, (torch.zeros(2, 25), torch.zeros(2, 26)))
    quality = SiteFidelity(0.1, 0.1, 0.0, 0.1)
    sliced, exact = Candidate("sliced_dual", 5, 1.0, quality, params), Candidate("exact", 40, 2.0, quality)
    selection = Selection(
        {
            "a": Choice(sliced, "why", (sliced, exact)),
            "b": Choice(Candidate("keep", 40, inf), "why", (exact,)),
            "c": Choice(exact, "why"),
        },
        ranges=dict.fromkeys("abc", (1.0, 2.5)),
        cheaper=Cheaper({"a": Candidate("truncated", 3, 0.5, quality)}, 2.5, True, (Term(Bound("relc", 0.2), inf),)),
    )
    fidelity = Fidelity(
        samples=10,
        logits_rel=0.1,
        agreement=0.9,
        metric=Metric("accuracy", 0.9, 0.8),
        outputs={"logits": 0.1},
        hops=(Hop("capture", 0.0, 0.0, 1.0), Hop("amortisation", 0.1, 0.1, 0.9), Hop("export", 0.0, 0.0, 1.0)),
        variants={name: VariantFidelity(None if name == "truncated" else 0.1, None, None) for name in VARIANTS},
        sites={"a": SiteFidelity(0.1, 0.1, 0.0, 0.1)},
    )
    batches = [
        BatchLatency(
            batch,
            tuple(LatencyRun(name, "ort", batch, ms * batch, ms, None, ms, 0.0, 10) for name, ms in VARIANTS.items()),
            {name: Ratio(ms / 2, 0.4 * ms, 0.6 * ms) for name, ms in VARIANTS.items() if name != "compiled"},
            floor=0.01,
            blocks=5,
            stable=batch == 1,
            warnings=("why",),
        )
        for batch in (1, 32)
    ]
    lowered = FittedActivation("gelu, float32", torch.nn.Identity(), 16, 1e-3, -6.0, 4.0, 2)
    artifacts = [{"kind": "onnx", "path": "model.onnx", "sha256": "0" * 64, "builder": "b", "targets": []}]
    stops = EarlyStops({"sinkhorn.py:7": "if err.item() < self.tol:"}, 1e-3, taken=True)
    findings = Findings(sites, (Miss("node", None, "why", "what to do"),), stops)
    verdict, latency = Verdict((Term(Bound("relc", 0.2), 0.1),)), Latency("cpu", 2, tuple(batches), CONDITIONS)
    samples = Samples({"x": torch.zeros(4, 1)})
    teacher = fitted.studied(torch.nn.Identity(), None, findings, samples)
    return report_data(
        run_of(teacher),
        teacher,
        selection,
        (lowered,),
        fidelity,
        verdict,
        latency,
        CostCheck(shipped(), 32, 1.0, -0.5),
        EngineResult("omitted"),
        OnnxArtifact(Path("model.onnx"), 18),
        artifacts,
        environment(seed=0),
    )


def run_of(teacher) -> dict:
    """What a report says of the run, as `commands.compile` puts it together."""
    value = {"name": "x", "shape": ["batch", 8, None], "dtype": "float32"}
    model = {"path": "model.pt", "sha256": "0" * 64, "weights_sha256": None, "parameters": teacher.loaded.parameters}
    return {
        "date": "2026-01-31T23:59:59+00:00",
        "command": command_line(Path("model.pt"), CompileConfig()),
        "model": {**model, "rebuild": None, "signature": None},
        "inputs": [value],
        "outputs": [value],
        "options": options_data(CompileConfig(), Path("model.asap"), 2),
        "stages": [{"stage": "load", "seconds": 0.5}, {"stage": "select", "seconds": 60.0}],
    }


def arrays(sites: int = 3, size: int = 24) -> dict[str, np.ndarray]:
    """Arrays of figures, of noise."""
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for number in range(sites):
        made[f"{number}.head"] = np.array(1)
        for name in ("teacher", "compiled"):
            made[f"{number}.{name}"] = rng.gamma(1.0, size=(2, size, size)).astype(np.float16)
        made[f"{number}.columns"] = rng.normal(1, 0.05, (2, 2, size)).astype(np.float32)
        made[f"{number}.dual"] = rng.normal(size=(2, 300)).astype(np.float32)
    return made
