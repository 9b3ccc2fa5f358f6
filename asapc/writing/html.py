"""Writes report.html: one page that holds all it shows, from the report and the arrays that its figures need."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from math import isfinite, log10
from pathlib import Path
from typing import Any

import numpy as np

from asapc.types.budget import parse_bound
from asapc.writing import charts
from asapc.writing.report import early_stop_note
from asapc.writing.words import cheaper_note, cost_check, label, number, output_errors

FIGURES = "figures.npz"
PAGE = "report.html"
# Differences below this are rounding; the bars of steps begin here.
LEAST_STEP = 1e-9
Row = dict[str, Any]
Arrays = Mapping[str, np.ndarray]


def write_figures(path: Path, arrays: Arrays) -> None:
    """Write the arrays that figures are drawn from."""
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def render(report: Mapping[str, Any], arrays: Arrays) -> str:
    """Return the page of a report.

    Args:
        report: the content of report.json.
        arrays: what `commands.figures.gather_figures` returned; figures whose arrays are not there are left out.
    """
    latency = list(latency_groups(report))
    context = {
        "report": report,
        "name": Path(report["model"]["path"]).name,
        "cards": list(cards(report)),
        "sections": [
            ("budget", "Budget"),
            ("model", "What was compiled"),
            ("latency", "Where the time goes"),
            ("steps", "What each step changes"),
            ("sites", "Site by site"),
            ("run", "The run"),
        ],
        "outputs_note": sentence(output_errors(report["fidelity"])),
        "notes": list(notes(report)),
        "sites": [site_data(report, index, site, arrays) for index, site in enumerate(report["sites"])],
        "latency": latency,
        "bars_cut": any(row["cut"] for group in latency for row in group["rows"]),
        "intervals": any(row["low"] is not None for group in latency for row in group["rows"]),
        "warnings": report["latency"].get("warnings", []),
        "costs_note": sentence(cost_check(report["costs"])),
        "hops": [{**hop, **log_bar(hop["rel"], report)} for hop in report["fidelity"]["hops"]],
        "cheaper_note": sentence(cheaper_note(report)),
        "stages": stage_rows(report["stages"]),
        "engine_note": engine_note(report["engine"]),
        "environment": list(environment_rows(report["environment"])),
    }
    return str(template().render(context))


@cache
def template() -> Any:
    """Return the template of the page, which escapes all that it is given."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters = {"number": decimals, "ms": milliseconds, "tiny": tiny, "shape": shape, "option": option}
    environment.filters.update({**filters, "sentence": sentence})
    environment.globals["style"] = Markup(read_template("report.css"))  # asapc's own, in which quotes stay quotes
    return environment.from_string(read_template("report.html"))


def read_template(name: str) -> str:
    """Return a file of the templates' folder."""
    return resources.files("asapc.writing").joinpath("templates", name).read_text(encoding="utf-8")


def cards(report: Mapping[str, Any]) -> Iterator[Row]:
    """Yield what stands at the top: how fast, and how close."""
    latency, fidelity = report["latency"], report["fidelity"]
    ratios = {ratio["name"]: ratio for ratio in latency.get("ratios", []) if ratio["batch"] == latency["batch"]}
    exact = all(site["choice"]["operator"] in ("exact", "keep") for site in report["sites"])
    rivals = {"teacher": "the model as written"} | ({} if exact else {"exact": "the best exact form"})
    for name, of in rivals.items():
        more = f"at batch {latency['batch']}{told(ratios.get(name))}"
        yield {"label": f"speed-up over {of}", "value": f"{latency[f'speedup_vs_{name}']:.2f}x", "more": more}
    more = f"at batch {latency['batch']}"
    yield {"label": "time over that of softmax attention", "value": f"{latency['ratio_to_softmax']:.2f}x", "more": more}
    if fidelity["agreement"] is None:
        value, label_ = f"{fidelity['logits_rel']:.2%}", "error of the first output"
    else:
        value, label_ = percent(fidelity["agreement"]), "same class as the teacher"
    yield {"label": label_, "value": value, "more": "on held-out samples"}
    if (metric := fidelity["metric"]) is not None:
        of_teacher = f"teacher {percent(metric['teacher'])}"
        yield {"label": metric["name"], "value": percent(metric["compiled"]), "more": of_teacher}


def told(ratio: Mapping[str, Any] | None) -> str:
    """Return the interval of a ratio in words, to follow others; empty where none is known."""
    if ratio is None:
        return ""
    if ratio["finding"] in ("identical", "not significantly different"):
        return f": {ratio['finding']}"
    return f", {ratio['low']:.2f} to {ratio['high']:.2f}"


def notes(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what else has to be known of the model."""
    if note := early_stop_note(report["early_stops"]):
        yield f"Captured {note}."
    for activation in report["activations"]:
        yield (
            f"{activation['nodes']} x {activation['name']}: a ReLU network of {activation['units']} units stands in, "
            f"off by {activation['error']:.1e} at most."
        )
    if misses := len(report["misses"]):
        yield f"{misses} near miss{'es' * (misses > 1)} stayed as written, and asapc inspect --why says why."


def latency_groups(report: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the runs of each batch size with their bars, which the teacher's does not shrink: it is cut off."""
    latency, variants, metric = report["latency"], report["fidelity"]["variants"], report["fidelity"]["metric"]
    ratios = {(ratio["name"], ratio["batch"]): ratio for ratio in latency.get("ratios", [])}
    for batch in sorted({run["batch"] for run in latency["runs"]}):
        group = [run for run in latency["runs"] if run["batch"] == batch]
        own = next(run["p50_ms"] for run in group if run["name"] == "compiled")
        ends = {name: (own * r["low"], own * r["high"]) for (name, of), r in ratios.items() if of == batch}
        shown = [run["p50_ms"] for run in group if run["name"] != "teacher"]
        most = max(*shown, *(high for name, (_, high) in ends.items() if name != "teacher"), 0.0)
        scale = 94 / most if most else 1.0
        rows = []
        for run in group:
            width, ratio = scale * run["p50_ms"], ratios.get((run["name"], batch))
            low, high = (None, None)
            if ratio is not None and ratio["finding"] != "identical" and width <= 100:
                low, high = (min(scale * end, 100) for end in ends[run["name"]])
            rows.append(
                {
                    **run,
                    **{name: variants[run["name"]][name] for name in ("agreement", "metric")},
                    "width": min(width, 100),
                    "cut": width > 100,
                    "low": low,
                    "high": high,
                    "ratio": beside(run, own, ratio),
                }
            )
        agreement = any(row["agreement"] is not None for row in rows)
        yield {"batch": batch, "rows": rows, "agreement": agreement, "metric": metric and metric["name"]}


def beside(run: Mapping[str, Any], own: float, ratio: Mapping[str, Any] | None) -> str:
    """Return a variant's time over that of the compiled model, with its interval where that is known."""
    if ratio is None:
        return milliseconds(run["p50_ms"] / own if own else None)
    if ratio["finding"] == "identical":
        return "same graph"
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def site_data(report: Mapping[str, Any], index: int, site: Mapping[str, Any], arrays: Arrays) -> Row:
    """Return a site with its figures."""
    choice = site["choice"]
    chosen = {key: value for key, value in choice.items() if key not in ("reason", "front")}
    limit = next((b.limit for b in map(parse_bound, report["budget"]) if b.metric == "relc"), None)
    teacher, compiled = (arrays.get(f"{index}.{name}") for name in ("teacher", "compiled"))
    columns, dual = arrays.get(f"{index}.columns"), arrays.get(f"{index}.dual")
    maps = [] if teacher is None or compiled is None else [charts.maps(*s) for s in zip(teacher, compiled, strict=True)]
    fits = teacher is None or (site["queries"], site["keys"]) == teacher.shape[1:]
    errors = site["fidelity"] or {}
    return {
        **site,
        "relc": errors.get("relc"),
        "column": errors.get("column_marginal_error"),
        "label": label(choice),
        "curve": charts.curve(choice["front"], chosen, limit),
        "curve_text": curve_text(site["name"], choice["front"], chosen),
        "columns": None if columns is None else charts.column_sums(columns),
        "dual": None if dual is None else charts.scatter(dual),
        "correlation": None if dual is None else correlation(dual),
        "head": int(arrays.get(f"{index}.head", np.array(0))),
        "maps": maps,
        "shown": "" if fits else ", of which evenly spaced ones are shown",
        "front": [{**c, "label": label(c), "chosen": c == chosen} for c in choice["front"]],
    }


def curve_text(name: str, front: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> str:
    """Describe the chart of a site's candidates for those who do not see it; the table below holds its points."""
    at = f"{milliseconds(chosen['estimated_ms'])} ms and relc {decimals(chosen['calibration_relc'])}"
    return f"Error by estimated time of {len(front)} operators for {name}; the chosen one is at {at}."


def correlation(dual: np.ndarray) -> float | None:
    """Return the correlation of a dual and its estimate, None where either does not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(np.corrcoef(dual)[0, 1])
    return value if isfinite(value) else None


def log_bar(value: float, report: Mapping[str, Any]) -> Row:
    """Return a bar on a logarithmic scale from rounding to the largest step."""
    most = max(hop["rel"] for hop in report["fidelity"]["hops"])
    span = log10(max(most, 10 * LEAST_STEP) / LEAST_STEP)
    width = 100 * log10(max(value, LEAST_STEP) / LEAST_STEP) / span
    return {"width": width, "cut": False, "low": None, "high": None}


def stage_rows(stages: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the stages with bars."""
    most = max((stage["seconds"] for stage in stages), default=0.0) or 1.0
    return [
        {**stage, "width": 100 * stage["seconds"] / most, "cut": False, "low": None, "high": None} for stage in stages
    ]


def engine_note(engine: Mapping[str, Any]) -> str:
    """Return a sentence on an engine that could not be built; empty where one was, or none was asked for."""
    return f"No engine was built: {engine['reason']}." if engine["status"] == "failed" else ""


def environment_rows(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a result depends on, beside the model."""
    for key, value in environment.items():
        if isinstance(value, Mapping):
            yield key, ", ".join(f"{name} {version}" for name, version in value.items())
        else:
            yield key, ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def sentence(text: str) -> str:
    """Return words as a sentence."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""


def percent(value: float) -> str:
    """Format a share."""
    return f"{100 * value:.4g} %"


def decimals(value: float | None) -> str:
    """Format a number with three digits that count, one that is not known as a dash."""
    return "-" if value is None else number(value)


def milliseconds(value: float | None) -> str:
    """Format a time, one that is not known as a dash."""
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def tiny(value: float) -> str:
    """Format a number that may be of any size."""
    return f"{value:.1e}" if value else "0"


def shape(sizes: Sequence[int | str | None]) -> str:
    """Format a shape; an open axis is named where it has a name."""
    return " x ".join("open" if size is None else str(size) for size in sizes) or "a number"


def option(value: Any) -> str:
    """Format the value of an option."""
    return "-" if value in (None, [], "") else value if isinstance(value, str) else json.dumps(value)
