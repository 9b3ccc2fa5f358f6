"""What features and closure steps cost and gain, beside exact and truncated Sinkhorn, on the shipped checkpoint.

    python -m benchmarks.operators

Every variant replaces all sites at once, runs in ONNX Runtime, and is compared with the teacher on the held-out
images; latencies are medians of interleaved runs in one process. Writes benchmarks/results/operators.json.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path

from torch import nn

from asapc.backends.eager.runner import EagerRunner
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.calibrate import Fitted, calibrate
from asapc.capture import capture
from asapc.choices import FeatureSet
from asapc.config import CompileConfig
from asapc.environment import environment
from asapc.export import rewrite
from asapc.gather import gather_samples
from asapc.loading import load_model
from asapc.measure import measure
from asapc.operators import exact_operator
from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual
from asapc.output import write_json
from asapc.passes.find_sinkhorn import find_sinkhorn
from asapc.propose import MOST_CLOSURE_STEPS, truncate
from asapc.verify import compare, first_output, metric, site_fidelity

ROOT = Path(__file__).resolve().parent
FEATURES = (FeatureSet(), FeatureSet(pieces=8), FeatureSet(slices=4), FeatureSet(slices=8))
TRUNCATED = (3, 5, 7, 9, 12, 20)
BATCHES = (1, 32)
SECONDS = 40.0
THREADS = 1


def main() -> None:
    """Measure all variants, print a table, write the JSON."""
    loaded = load_model(ROOT.parent / "models" / "digits.pt")
    calibration, held_out = gather_samples(loaded, CompileConfig())
    graph = capture(loaded, calibration)
    sites = find_sinkhorn(graph, calibration[:2]).sites

    variants: dict[str, dict[str, nn.Module]] = {
        "teacher": {},
        "exact": {site.name: exact_operator(site) for site in sites},
        "softmax": {site.name: Sinkhorn(1) for site in sites},
    }
    for half_steps in TRUNCATED:
        variants[f"truncated {half_steps}"] = {site.name: exact_operator(site, half_steps) for site in sites}
    fitting, selection = calibration[len(calibration) // 4 :], calibration[: len(calibration) // 4]
    fitted = calibrate(graph, {s.name: FEATURES for s in sites}, sites, fitting, selection, MOST_CLOSURE_STEPS)
    for features in FEATURES:
        kind = f"{features.slices} slices" if features.slices else "hinges" if features.pieces else "parabolas"
        for steps in range(1 + MOST_CLOSURE_STEPS):
            variants[f"{kind}, {steps} closure steps"] = {
                s.name: SlicedDual(truncate(fitted[Fitted(s.name, features)], steps)) for s in sites
            }

    teacher = first_output(EagerRunner(loaded.module), held_out)
    rows: dict[str, dict[str, object]] = {}
    runners = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, modules in variants.items():
            artifact = export_onnx(rewrite(graph, sites, modules), Path(scratch) / "model.onnx", {})
            runners[name] = OnnxRuntimeRunner(artifact.path, THREADS)
            output = first_output(runners[name], held_out)
            hop, scored = compare(name, teacher, output), metric(teacher, output, held_out.labels)
            rows[name] = {
                "relc": [f.relc for f in site_fidelity(graph, sites, modules, held_out).values()],
                "agreement": hop.agreement,
                "accuracy": None if scored is None else scored.compiled,
                "logits_rel": hop.rel,
            }
    for batch in BATCHES:
        for run in measure(runners, held_out, batch, SECONDS):
            rows[run.name][f"batch_{batch}"] = asdict(run)

    print(f"{'variant':<28} {'relc by site':<18} {'agree':>6} {'acc':>6} {'ms, batch 1':>12} {'ms, batch 32':>13}")
    for name, row in rows.items():
        relc = " ".join(f"{value:.4f}" for value in row["relc"])
        times = [row[f"batch_{batch}"]["p50_ms"] for batch in BATCHES]
        print(f"{name:<28} {relc:<18} {row['agreement']:6.3f} {row['accuracy']:6.3f} {times[0]:12.2f} {times[1]:13.2f}")
    data = {"model_sha256": loaded.sha256, "threads": THREADS, "variants": rows, "environment": environment(seed=0)}
    (ROOT / "results").mkdir(exist_ok=True)
    write_json(ROOT / "results" / "operators.json", data)


if __name__ == "__main__":
    main()
