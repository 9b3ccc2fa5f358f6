"""Which side's dual to estimate: the queries', as ASAP does, or the keys', as asapc does.

    python -m benchmarks.sides [checkpoint ...]

Both from the same features with the same fitted closure steps, in float64, fitted on calibration samples and judged on
held-out ones: relc, the error of the attention output over the norm of the token-centred teacher output. From a dual of
the queries an operator takes two half-steps, from one of the keys three, of which the first is the softmax that makes
the kernel; each step adds two to either. Writes benchmarks/results/sides.json.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from asapc.artifacts import CapturedGraph, Samples, Site
from asapc.calibrate import activation, balanced_bases
from asapc.capture import capture
from asapc.choices import Regression
from asapc.config import CompileConfig
from asapc.environment import environment
from asapc.fit import fit
from asapc.loading import load_model
from asapc.ops.c_transform import column_step, plan, row_step
from asapc.ops.features import dual_features, project
from asapc.ops.sinkhorn import sinkhorn_duals
from asapc.ops.sliced_dual import target_dual
from asapc.output import write_json
from asapc.passes.layout import operands, site_inputs
from asapc.passes.record import record
from asapc.pipeline import find, gather_samples

ROOT = Path(__file__).resolve().parent
STEPS, HELD_OUT = 4, 128
Step = Callable[[Tensor, Tensor], Tensor]


def keys_side(scores: Tensor, g: Tensor) -> Tensor:
    """Closure of a dual of the keys."""
    return column_step(scores, row_step(scores, g))


def queries_side(scores: Tensor, f: Tensor) -> Tensor:
    """Closure of a dual of the queries."""
    return row_step(scores, column_step(scores, f))


def main() -> None:
    """Compare on every site of every checkpoint, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, default=[ROOT.parent / "models" / "digits.pt"])
    rows = []
    for path in parser.parse_args().checkpoints:
        loaded = load_model(path)
        calibration, held_out = gather_samples(loaded, CompileConfig())
        graph = capture(loaded, calibration)
        for site in find(graph, calibration).sites:
            given = [activations(graph, site, s) for s in (calibration[16:], calibration[:16], held_out[:HELD_OUT])]
            for side in ("queries", "keys"):
                errors = relc_by_steps(site, side, *given)
                print(f"{path.stem:<28} {site.name:<24} {side:<8}", *(f"{error:.4f}" for error in errors), flush=True)
                rows.append({"checkpoint": path.name, "site": site.name, "side": side, "relc_by_steps": errors})
    write_json(ROOT / "results" / "sides.json", {"rows": rows, "environment": environment(seed=0)})


def activations(graph: CapturedGraph, site: Site, samples: Samples) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, queries, keys and values of a site that ends on rows and has no mask, in float64."""
    values = record(graph.program.module(), samples, {operand.node for operand in operands(site)})
    applied = site_inputs(site, [values[operand.node].double() for operand in operands(site)], None)[-1]
    assert applied is not None
    return *activation(site, values), applied


def relc_by_steps(site: Site, side: str, fitting: tuple, selection: tuple, held_out: tuple) -> list[float]:
    """Error on held-out samples after 0, 1 ... fitted closure steps."""
    bases = balanced_bases([site], iter([{site.name: fitting[:3]}]))[site.name]
    close: Step = keys_side if side == "keys" else queries_side
    parts = (fitting, selection, held_out)
    vectors, targets = [], []
    for scores, queries, keys, _ in parts:
        x, y = project(queries, bases[0]), project(keys, bases[1])
        ends = (y, x) if side == "keys" else (x, y)
        vectors.append(dual_features(*ends, 0, torch.zeros(site.heads, 0, 0, dtype=torch.float64)))
        duals = sinkhorn_duals(scores, site.half_steps - 2)[0] if side == "queries" else None
        targets.append(target_dual(scores, site.half_steps) if duals is None else duals)
    errors = []
    for _ in range(STEPS):
        weights = fit(*(regression(v, t) for v, t in zip(vectors[:2], targets[:2], strict=True)))
        estimates = [torch.einsum("hf,bhfn->bhn", weights, v) for v in vectors]
        closures = [close(part[0], estimate) for part, estimate in zip(parts, estimates, strict=True)]
        errors.append(relc(site, side, estimates[-1], *held_out))
        vectors = [torch.cat([v, c.unsqueeze(-2)], dim=-2) for v, c in zip(vectors, closures, strict=True)]
    return errors


def regression(vectors: Tensor, target: Tensor) -> Regression:
    """Statistics of a linear map from vectors (B, H, F, N) to a target (B, H, N), both centred."""
    vectors, target = (v - v.mean(dim=-1, keepdim=True) for v in (vectors, target))
    return Regression(
        gram=torch.einsum("bhfn,bhen->hfe", vectors, vectors),
        moment=torch.einsum("bhfn,bhn->hf", vectors, target),
        energy=target.square().sum(dim=(0, 2)),
        count=target[:, 0].numel(),
    )


def relc(site: Site, side: str, dual: Tensor, scores: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> float:
    """Error of the output of the plan that is rebuilt from an estimated dual."""
    g = keys_side(scores, dual) if side == "keys" else column_step(scores, dual)
    expected = plan(scores, *sinkhorn_duals(scores, site.half_steps)) @ values
    seen = plan(scores, row_step(scores, g), g) @ values
    centred = expected - expected.mean(dim=-2, keepdim=True)
    return ((seen - expected).norm() / centred.norm()).item()


if __name__ == "__main__":
    main()
