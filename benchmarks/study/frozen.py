"""The frozen layer: everything that may replace a trained teacher's loop, without retraining.

Errors are of each layer alone, on what it gets of held-out samples; agreement and accuracy of the whole model, with all
its layers replaced. Times are of each layer alone in ONNX Runtime, all of them in turns with the loop as written.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from math import nan
from operator import itemgetter
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import torch

from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.commands.study import study
from asapc.fidelity.outputs import accuracy, agreement
from asapc.fidelity.sites import Reference, candidate_fidelity, centre
from asapc.models.sliced import SlicedTransport
from asapc.passes.layout import site_inputs
from asapc.passes.record import record
from asapc.timing.blocks import Effort
from asapc.timing.compare import compare
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.types.teacher import Teacher
from benchmarks.attention import onnx_runner
from benchmarks.fidelity import kind, outputs_with
from benchmarks.study.forms import (
    BATCH,
    DEFAULT,
    EXACT,
    SLICES,
    SOFTMAX,
    TRUNCATIONS,
    WRITTEN,
    Modules,
    compiled,
    layer,
    planned,
    rivals,
    sliced_transport,
    sorted_slices,
    width,
    written,
)
from benchmarks.study.models import trained
from benchmarks.study.tables import half_width, spread
from benchmarks.study.teachers import QUICK_TASKS, TASKS, by_task, cases_of, count_seeds

HELD_OUT, QUICK_HELD_OUT = 128, 16  # samples that the whole model runs on
JUDGES = 16  # samples that layers run on: of many tokens and heads each
# Of each layer's times. Sliced transport takes up to a hundred times as long as the others: few rounds tell enough.
EFFORT, FEW, QUICK = Effort(12.0), Effort(1.0, rounds=2), Effort(0.1, blocks=2, rounds=2)
TRANSPORT = "sliced transport"
FILES = tempfile.TemporaryDirectory()  # what takes a minute to export, for as long as this process lives
CLAIM_HALF_STEPS, CLAIM = 40, 5.3  # "5.3x over the trained Sinkhorn teacher on a frozen layer", ASAP's abstract, T = 20
MATCHED = 0.99  # of the teacher's accuracy
Row = dict[str, Any]


def cases(quick: bool) -> dict[str, Callable[[], Row]]:
    """Return a case for each teacher."""
    return cases_of(measure, quick, QUICK_TASKS if quick else TASKS)


def measure(task: str, seed: int, quick: bool) -> Row:
    """Measure all forms on one teacher; lists have an entry for each layer."""
    teacher = study(trained(task, "sinkhorn", seed, quick))
    sites, selection = teacher.sites, planned(teacher)
    counts, truncations = (SLICES[:1], TRUNCATIONS[:1]) if quick else (SLICES, TRUNCATIONS)
    forms = {
        WRITTEN: written(teacher),
        **compiled(teacher, selection),
        **{f"{count} sorted slices": sorted_slices(teacher, selection, count) for count in counts},
        **rivals(teacher, selection, truncations),
        **{f"{TRANSPORT}, {count}": sliced_transport(teacher, count) for count in counts},
    }
    samples = teacher.held_out[: QUICK_HELD_OUT if quick else HELD_OUT]
    reference = outputs_with(teacher.graph, sites, {}, samples)
    of_forms = errors(teacher, forms, samples[:JUDGES])
    for name, modules in forms.items():
        outputs = outputs_with(teacher.graph, sites, modules, samples)
        of_forms[name]["agreement"] = agreement(reference, outputs, labelled=True)
        of_forms[name]["accuracy"] = accuracy(outputs, samples.labels)
    for site in sites[:1] if quick else sites:
        for name, of_form in time_forms(teacher, site, forms, quick).items():
            for key, value in of_form.items():
                of_forms[name].setdefault(key, []).append(value)
    return {
        "task": task,
        "seed": seed,
        "half_steps": sites[0].loop.half_steps,
        "tokens": sites[0].loop.keys,
        "heads": sites[0].loop.heads,
        "head_size": width(sites[0]),
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "accuracy": accuracy(reference, samples.labels),
        "planned": [kind(selection.choices[site.name].candidate) for site in sites],
        "forms": of_forms,
    }


def errors(teacher: Teacher, forms: Mapping[str, Modules], samples: Samples) -> dict[str, Row]:
    """Return the errors of each layer alone in all forms, lists by layer."""
    sites = teacher.sites
    candidates = {site.name: {name: modules[site.name] for name, modules in forms.items()} for site in sites}
    of_sites, share = candidate_fidelity(teacher.graph, sites, candidates, samples), centred_share(teacher, samples)
    return {
        name: {
            "relative": [of_sites[site.name][name].relc * share[site.name] for site in sites],
            "relc": [of_sites[site.name][name].relc for site in sites],
            "columns": [of_sites[site.name][name].column_marginal_error for site in sites],
        }
        for name in forms
    }


def centred_share(teacher: Teacher, samples: Samples) -> dict[str, float]:
    """Return by the site's name the norm of its output less the mean over its tokens, as a share of the norm."""
    graph, sites = teacher.graph, teacher.sites
    nodes = {operand.node for site in sites for operand in (*site.wiring.operands, site.wiring.plan)}
    squares = {site.name: torch.zeros(2, dtype=torch.float64) for site in sites}
    for batch in samples.batches(graph.samples_at_once(BATCH)):
        values = record(graph.program.module(), batch, nodes)
        for site in sites:
            loop = Reference.of(site, values)
            parts = centre(loop.output, loop.rows), loop.output
            squares[site.name] += torch.stack([part.square().sum() for part in parts])
    return {name: float((centred / whole).sqrt()) for name, (centred, whole) in squares.items()}


def time_forms(teacher: Teacher, site: Site, forms: Mapping[str, Modules], quick: bool) -> dict[str, Row]:
    """Time one layer in all forms: milliseconds, and how many times as fast as written, with the interval."""
    samples = captured(teacher, site)
    fast, slow = ([name for name in forms if name.startswith(TRANSPORT) == is_slow] for is_slow in (False, True))
    times: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for number, (name, modules) in enumerate(forms.items()):
            if name in slow:
                runners[name] = transport_runner(layer(site, modules[site.name]).slices, samples.inputs["q"].shape)
            else:
                place = Path(folder, str(number))
                place.mkdir()
                runners[name] = onnx_runner(layer(site, modules[site.name]), samples, place)
        for names, effort in (([WRITTEN, *slow], FEW), (fast, EFFORT)):
            models = {name: runners[name].reopen for name in names}
            latency, _ = compare(models, {}, samples, BATCH, QUICK if quick else effort)
            speeds = {name: (1 / ratio.value, 1 / ratio.high, 1 / ratio.low) for name, ratio in latency.ratios.items()}
            for run in latency.runs:
                times[run.name] = {"ms": run.p50_ms, "speed": speeds.get(run.name, (1.0, 1.0, 1.0))}
    return times


@cache
def transport_runner(slices: int, shape: torch.Size) -> OnnxRuntimeRunner:
    """Return sliced transport on queries, keys and values of one shape, exported once: it has no weights."""
    folder = Path(FILES.name, f"{slices} slices of {' x '.join(map(str, shape))}")
    folder.mkdir()
    samples = Samples({name: torch.randn(shape) for name in "qkv"})
    return onnx_runner(SlicedTransport(slices), samples, folder)


def captured(teacher: Teacher, site: Site) -> Samples:
    """Return the queries, keys and values that a layer gets of a batch of held-out samples."""
    nodes = [operand.node for operand in site.wiring.operands]
    values = record(teacher.graph.program.module(), teacher.held_out[:BATCH], nodes)
    inputs = site_inputs(site, [values[node] for node in nodes], None)
    points = {"q": inputs.queries, "k": inputs.keys, "v": inputs.values}
    return Samples({name: value.contiguous() for name, value in points.items()})


def section(rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield the section: a table for each task, and what it says of the claim and of the rivals."""
    first = next(iter(rows.values()))
    yield "## The frozen layer"
    yield ""
    yield (
        "What may replace a trained loop, without retraining. Errors are of each layer alone on held-out samples, "
        "means of the layers: of the output, of the output less its mean over the tokens (relc), and of the column "
        f"sums. Agreement and accuracy are of the whole model with all layers replaced, on {HELD_OUT} held-out "
        f"samples, of which one is {100 / HELD_OUT:.1f} points; the table above has all. Speed is that of a layer "
        f"alone in ONNX Runtime, over the loop as written, in turns, batch {first['batch']}, {first['threads']} "
        f"thread{'s' * (first['threads'] > 1)}. Sorted slices are random directions; they give the queries' dual by "
        "one linear map, closed once, after ASAP. Sliced transport is a mean of plans along as many slices, by soft "
        "sorts."
    )
    yield ""
    for task, of_seeds in by_task(rows).items():
        shape = of_seeds[0]
        yield (
            f"### {task}: {shape['half_steps']} half-steps, {shape['tokens']} tokens, {shape['heads']} heads of "
            f"{shape['head_size']}, {count_seeds(of_seeds)}"
        )
        yield ""
        yield "| form | relative error | relc | column error | agreement | accuracy | times as fast as written |"
        yield "|---|---:|---:|---:|---:|---:|---:|"
        for name in shape["forms"]:
            yield line(name, [row["forms"][name] for row in of_seeds])
        yield ""
        yield from verdicts(of_seeds)
        yield ""


def line(name: str, of_seeds: Sequence[Row]) -> str:
    """Return one form's row of a table."""
    errors = [spread([fmean(form[key]) for form in of_seeds]) for key in ("relative", "relc", "columns")]
    whole = [spread([form[key] for form in of_seeds]) for key in ("agreement", "accuracy")]
    return f"| {name} | " + " | ".join([*errors, *whole, spread([speed(form) for form in of_seeds])]) + " |"


def speed(form: Row) -> float:
    """Return how many times as fast as written a form is: the geometric mean of the layers."""
    return geometric_mean(value for value, _, _ in form["speed"])


def verdicts(of_seeds: Sequence[Row]) -> Iterator[str]:
    """Yield what a task's table says: of the claim, of those that beat the default, and of how sure the times are."""
    defaults = [row["forms"][DEFAULT] for row in of_seeds]
    choices = sorted({choice for row in of_seeds for choice in row["planned"]})
    speeds = [speed(form) for form in defaults]
    share = accuracy_share(of_seeds)
    claim = against_claim(of_seeds[0]["half_steps"], min(speeds), share)
    yield (
        f"By default the planner takes {' or '.join(choices)}: {spread(speeds)} times as fast as the loop as "
        f"written, at {share:.3f} of the teacher's accuracy.{claim}"
    )
    exact, softmax = (
        spread([speed(row["forms"][DEFAULT]) / speed(row["forms"][name]) for row in of_seeds])
        for name in (EXACT, SOFTMAX)
    )
    yield f"The exact form takes {exact} times as long as that, softmax {softmax} times."
    forms = [row["forms"] for row in of_seeds]
    close, accurate = (
        [name for name in of_seeds[0]["forms"] if name != DEFAULT and beats(forms, name, merit)]
        for merit in (closeness, itemgetter("accuracy"))
    )
    yield f"As close and no slower: {', '.join(close)}." if close else "No other form is as close and as fast."
    yield f"As accurate and no slower: {', '.join(accurate)}." if accurate else "None is as accurate and as fast."
    widths = [
        half_width(*interval)
        for row in of_seeds
        for name, form in row["forms"].items()
        for interval in form["speed"]
        if not name.startswith(TRANSPORT)  # of which few rounds tell enough
    ]
    yield f"The 95 % intervals of single ratios are at most {max(widths):.1%} to either side, sliced transport's aside."


def accuracy_share(of_seeds: Sequence[Row]) -> float:
    """Return the share of the teachers' accuracy that the default keeps; not a number where a teacher has none."""
    return fmean(row["forms"][DEFAULT]["accuracy"] / (row["accuracy"] or nan) for row in of_seeds)


def against_claim(half_steps: int, least: float, share: float) -> str:
    """Say whether ASAP's figure is reached, where it is about such a loop."""
    if half_steps != CLAIM_HALF_STEPS:
        return ""
    if not share >= MATCHED:
        return f" The accuracy is not matched, so that this says nothing about the {CLAIM} times of ASAP's abstract."
    return f" ASAP's abstract states {CLAIM} times, which {'every' if least >= CLAIM else 'not every'} seed reaches."


def beats(of_seeds: Sequence[Row], name: str, merit: Callable[[Row], float]) -> bool:
    """Return whether a form has no less of a merit than the default and is no slower, in the mean of the seeds."""
    return all(
        fmean(of(forms[name]) for forms in of_seeds) >= fmean(of(forms[DEFAULT]) for forms in of_seeds)
        for of in (merit, speed)
    )


def closeness(form: Row) -> float:
    """Return the negative of a form's error, mean of the layers."""
    return -fmean(form["relc"])
