"""What NVIDIA's compiler makes of every form that asapc gives a model: built, refused, or crashed.

    python -m benchmarks.builds                  # what is not there yet: all models that asapc recognises
    python -m benchmarks.builds --only 'keys*'   # names as in a shell; these are built again
    python -m benchmarks.builds --render         # the document only

TensorRT-RTX builds for a GPU without one. Each model of tests/helpers/zoo, and models/language.pt, is built as it was
written, and with each operator at every site that takes it, in each lowering, in float32 and float16, with an open
batch, and with open lengths where the model has them. It writes benchmarks/results/builds.json as it goes, and what
stands in docs/tensorrt.md between the two markers. It times nothing, so it may run beside other work. Run from the root
of a checkout.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from math import inf
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.tensorrt.builder import build_engine
from asapc.commands.study import study_module
from asapc.config import CompileConfig
from asapc.errors import AsapcError, BuildError, one_line
from asapc.loading.model import load_model
from asapc.ops.sliced_dual import bias_side
from asapc.planning.amortise import WIDTHS, initial, layer_sizes, why_not_amortised
from asapc.planning.calibrate import FitKey, calibrate
from asapc.planning.operators import Operator, build, lowerings, packs
from asapc.planning.propose import why_not_sliced
from asapc.types.artifacts import OnnxArtifact
from asapc.types.choices import SIDES, Candidate, FeatureSet
from asapc.types.engine import EngineOptions
from asapc.types.graph import Axes
from asapc.types.options import Lowering, Precision
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.types.teacher import Teacher
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from asapc.writing.rewrite import rewrite
from benchmarks.generated import replace_generated
from benchmarks.recognition import cell, quieten

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the zoo is the tests' own

from helpers.zoo import POSITIVES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "builds.json"
DOCUMENT = ROOT / "docs" / "tensorrt.md"
SAMPLES = 16  # for the finder
LARGEST_BATCH = 8
LANGUAGE = "language"  # models/language.pt
LONGEST = 512  # of open lengths
FEW = 3  # half-steps
SLICES, PIECES, CLOSURE_STEPS = 4, 8, 1
LEVELLED = "exact, levelled"  # as for scores that spread far, `ops.scaling.MAX_SPREAD`
ONE = ("SM89",)  # the architecture of most builds: every further one takes as long again
# Of which every architecture is tried, and of the exact forms of small plans.
EVERYWHERE = ("hinges, keys", "materialised")
# What is also built in float16, and with open lengths: the other forms differ from these in parts that they share.
MAIN = ("as written", "exact", "hinges, keys", "one pass")

Row = dict[str, Any]
Modules = Mapping[str, Operator]


def main() -> None:
    """Build what is asked for, write the JSON, render the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="names of models, built again")
    parser.add_argument("--processes", type=int, default=2, help="how many models at once")
    parser.add_argument("--render", action="store_true", help="render the document only")
    options = parser.parse_args()
    data: Row = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"models": {}}
    every = [*(case.name for case in POSITIVES), LANGUAGE]
    names = [] if options.render else [name for name in every if is_due(name, options.only, data)]
    for row in rows_of(names, options.processes):
        name = row.pop("name")
        data["models"][name] = row
        data["environment"] = environment(seed=0)
        write_json(RESULTS, data)
        print(f"{name:<32} {dict(Counter(outcome(build) for build in row['builds']))}", flush=True)
    order = [name for name in every if name in data["models"]]
    write_json(RESULTS, {**data, "models": {name: data["models"][name] for name in order}})
    replace_generated(DOCUMENT, document(json.loads(RESULTS.read_text())))


def is_due(name: str, patterns: Sequence[str] | None, data: Row) -> bool:
    """Return whether a model is to be built: by default if it has not been."""
    return name not in data["models"] if patterns is None else any(fnmatch(name, pattern) for pattern in patterns)


def rows_of(names: Sequence[str], processes: int) -> Iterator[Row]:
    """Yield the rows of models as they are done."""
    if not names:
        return
    # A process keeps what torch compiled and traced; a fresh one now and then bounds the memory.
    with get_context("spawn").Pool(processes, quieten, maxtasksperchild=5) as pool:
        yield from pool.imap_unordered(build_all, names)


def load(name: str) -> tuple[nn.Module, Samples, int]:
    """Return a model of the zoo, or the language model that is shipped, with samples and its greatest length."""
    if name == LANGUAGE:
        loaded = load_model(ROOT / "models" / "language.pt")
        samples = loaded.calibration[:SAMPLES]
        return loaded.module, samples, samples.inputs["tokens"].shape[1]
    case = next(case for case in POSITIVES if case.name == name)
    torch.manual_seed(0)
    return case.build().eval(), Samples(case.inputs(SAMPLES, torch.Generator().manual_seed(0))), LONGEST


def build_all(name: str) -> Row:
    """Return what becomes of all forms of one model."""
    module, samples, longest = load(name)
    teacher = study_module(module, samples)
    row: Row = {
        "name": name,
        "masked": any(site.loop.masked for site in teacher.sites),
        "lengths": "open",
        "builds": [],
    }
    if not teacher.sites:
        return row
    row["builds"] += builds(teacher, "float32")
    row["builds"] += builds(teacher, "float16", MAIN)
    try:
        axes = f"batch=1:{LARGEST_BATCH},seq=2:{longest}"
        reopened = study_module(module, samples, config=CompileConfig(dynamic=axes))
    except AsapcError as error:
        row["lengths"] = str(error)
    else:
        row["builds"] += builds(reopened, "float32", MAIN)
    return row


def builds(teacher: Teacher, precision: Precision, names: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield what becomes of each form of a model, or of those with some names, in a precision."""
    graph, lengths = teacher.open_graph, "fixed" if teacher.open_graph is teacher.graph else "open"
    with tempfile.TemporaryDirectory() as folder:
        for (form, lowering), modules in forms(teacher).items():
            if names is not None and form not in names:
                continue
            row: Row = {"form": form, "lowering": lowering, "precision": precision, "lengths": lengths}
            try:
                program = rewrite(graph, teacher.open_sites, modules, getattr(torch, precision))
                onnx = export_onnx(program, Path(folder) / "model.onnx", {}, standard=precision != "float32")
            except Exception as error:  # a defect of one form must not lose what is known of the others
                yield row | {"defect": one_line(error)[:200]}
                continue
            small = form == "exact" and all(map(packs, teacher.sites))
            everywhere = lengths == "fixed" and (small or (form, lowering) == EVERYWHERE)
            yield row | engine(onnx, graph.axes, () if everywhere else ONE)


def engine(onnx: OnnxArtifact, axes: Axes | None, architectures: tuple[str, ...] = ()) -> Row:
    """Return the architectures that a file is built for, and why it is refused for others."""
    try:
        artifact = build_engine(
            onnx, onnx.path.with_name("model.engine"), LARGEST_BATCH, axes, "tensorrt-rtx", EngineOptions(architectures)
        )
    except BuildError as error:
        return {"reason": str(error), "node": error.node}
    return {"targets": artifact.targets, "refused": artifact.refused}


def forms(teacher: Teacher) -> dict[tuple[str, str], Modules]:
    """Return the operators of a model's sites, by form and lowering; sites without that form get the exact one."""
    candidates = fit(teacher)
    of_models: dict[tuple[str, str], Modules] = {("as written", ""): {}}
    for form in dict.fromkeys(form for of_site in candidates.values() for form in of_site):
        for lowering in get_args(Lowering):
            modules: dict[str, Operator] = {}
            for site in teacher.sites:
                of_site = candidates[site.name]
                wide = frozenset([site.name] if form == LEVELLED else [])
                module = build(site, of_site.get(form, of_site["exact"]), wide)
                module.lowering = lowering if lowering in lowerings(site, module) else "materialised"
                modules[site.name] = module
            if any(module.lowering == lowering for module in modules.values()):
                of_models[form, lowering] = modules
    return of_models


def fit(teacher: Teacher) -> dict[str, dict[str, Candidate]]:
    """Return the operators that may replace each site, by the site's name and by what the tables call them."""
    sets = {site.name: feature_sets(site) for site in teacher.sites if why_not_sliced(site) is None}
    sites = [site for site in teacher.sites if site.name in sets]
    fitting, selection = teacher.calibration[: SAMPLES // 2], teacher.calibration[SAMPLES // 2 :]
    of_sites = {name: list(of_site.values()) for name, of_site in sets.items()}
    fits = calibrate(teacher.graph, of_sites, sites, fitting, selection, CLOSURE_STEPS) if sites else {}
    candidates: dict[str, dict[str, Candidate]] = {}
    for site in teacher.sites:
        steps = site.loop.half_steps
        exact = Candidate("exact", steps, inf)
        candidates[site.name] = {"exact": exact} | ({} if packs(site) else {LEVELLED: exact})
        if steps > FEW:
            candidates[site.name][f"truncated, {FEW}"] = Candidate("truncated", FEW, inf)
        if why_not_amortised(site) is None:
            layers = initial(
                1, layer_sizes(site, WIDTHS[0]), torch.Generator().manual_seed(0)
            )  # the weights are no matter
            candidates[site.name][f"network, {FEW}"] = Candidate("amortised", FEW, inf, params=layers.one_of(0))
        for form, features in sets.get(site.name, {}).items():
            params = fits[FitKey(site.name, features)]
            candidates[site.name][form] = Candidate("sliced_dual", steps, inf, params=params)
    return candidates


def feature_sets(site: Site) -> dict[str, FeatureSet]:
    """Return the features of a site's sliced duals, by what the tables call them."""
    paired = (site.head_dim or 0) > 1
    sets = {f"hinges, {side}": FeatureSet(0, PIECES, side, paired) for side in SIDES}
    sets["one pass"] = FeatureSet(0, PIECES, bias_side(site.loop.last), paired, one_pass=True)
    if not site.loop.masked:  # which a sort does not serve
        sets["sorted"] = FeatureSet(SLICES)
    return sets


def outcome(build: Row) -> str:
    """Return what became of a form: built, refused by the compiler, crashed in it, or not exported."""
    if "targets" in build:
        return "built"
    return "not exported" if "defect" in build else "crashed" if "crashed" in build["reason"] else "refused"


def document(data: Row) -> Iterator[str]:
    """Yield lines of the generated part."""
    models, packages = data["models"], data["environment"]["packages"]
    rows = [{"model": name, **build} for name, model in models.items() for build in model["builds"]]
    counts = Counter(map(outcome, rows))
    yield (
        f"{len(rows):,} engines of {len(models)} models, by TensorRT-RTX {packages['tensorrt-rtx-cu12']}: "
        f"{counts['built']:,} built, {counts['refused']} refused, {counts['crashed']} crashed; "
        f"{sum(model['masked'] for model in models.values())} models are masked, and "
        f"{sum(model['lengths'] == 'open' for model in models.values())} can have open lengths. Built, of those tried:"
    )
    yield ""
    columns = [("float32", "fixed"), ("float16", "fixed"), ("float32", "open")]
    yield (
        "| form | lowering | " + " | ".join(f"{precision}, {lengths} lengths" for precision, lengths in columns) + " |"
    )
    yield "|---|---|---|---|---|"
    for form, lowering in dict.fromkeys((row["form"], row["lowering"]) for row in rows):
        of_form = [row for row in rows if (row["form"], row["lowering"]) == (form, lowering)]
        cells = [share_built([row for row in of_form if (row["precision"], row["lengths"]) == c]) for c in columns]
        yield f"| {form} | {lowering} | {' | '.join(cells)} |"
    yield ""
    yield "| not built | model | reason, NVIDIA's or asapc's |"
    yield "|---|---|---|"
    for row in rows:
        if outcome(row) != "built":
            name = ", ".join(
                filter(None, (row["form"], row["lowering"], row["precision"], f"{row['lengths']} lengths"))
            )
            yield f"| {name} | {row['model']} | {cell(row.get('reason') or row['defect'])} |"
    yield ""
    yield from by_architecture(
        [row for row in rows if "targets" in row and len(row["targets"]) + len(row["refused"]) > 1]
    )


def share_built(rows: Sequence[Row]) -> str:
    """Return how many of some forms were built, as a cell of the table."""
    return f"{sum(outcome(row) == 'built' for row in rows)} of {len(rows)}" if rows else ""


def by_architecture(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of architectures, of forms that were tried for all of them."""
    yield "| architecture | precision | built | NVIDIA's reason, where it is refused |"
    yield "|---|---|---|---|"
    for precision in dict.fromkeys(row["precision"] for row in rows):
        of_precision = [row for row in rows if row["precision"] == precision]
        for name in sorted({*of_precision[0]["targets"], *of_precision[0]["refused"]}, key=lambda name: int(name[2:])):
            refused = [row for row in of_precision if name in row["refused"]]
            reasons = Counter(row["refused"][name] for row in refused).most_common(1)
            share = f"{len(of_precision) - len(refused)} of {len(of_precision)}"
            yield f"| {name} | {precision} | {share} | {cell(reasons[0][0]) if reasons else ''} |"


if __name__ == "__main__":
    main()
