"""Turns results into tables and sentences, which `asapc.terminal` renders."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asapc.writing.words import cheaper_note, cost_check, kinds, label, output_errors, outside_note, outside_share

WORTHWHILE = 0.05  # of an error, to be worth more samples
FAR = 30  # times the samples' scores: models seldom get there
# The cells of a table's row.
Row = tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: stands above it.
        columns: their heads.
        words: heads of the columns that hold words; all others hold numbers.
        groups: rows of cells, with a gap between groups.
    """

    title: str
    columns: tuple[str, ...]
    words: tuple[str, ...]
    groups: list[list[Row]]


def markdown(parts: Iterable[Grid | str]) -> str:
    """Write tables and sentences as Markdown."""
    blocks = []
    for part in parts:
        if isinstance(part, str):
            blocks.append(plain(part))
            continue
        rows = [row for group in part.groups for row in group]
        rule = ["---" if column in part.words else "---:" for column in part.columns]
        lines = [part.columns, rule, *rows]
        cells = [[cell if line is rule else plain(cell) for cell in line] for line in lines]
        blocks += [f"**{plain(part.title)}**", "\n".join(f"| {' | '.join(line)} |" for line in cells)]
    return "\n\n".join(blocks) + "\n"


def plain(text: str) -> str:
    """Write a text so that Markdown takes nothing in it for markup."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", text.strip().replace("\n", " "))


def fixed(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` decimals, None as nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def inspection(sites: list[dict[str, Any]]) -> Iterator[Grid | str]:
    """Show sites as `inspect` lists them, and where they stand in the code."""
    if not sites:
        return
    rows: list[Row] = [
        (
            site["name"],
            str(site["half_steps"]),
            site["last"],
            epsilon(site),
            str(site["heads"]),
            size(site),
            "yes" if site["masked"] else "no",
            f"{site['share']:.0%}",
        )
        for site in sites
    ]
    columns = ("site", "half-steps", "ends on", "epsilon", "heads", "N x M", "mask", "time")
    yield Grid("Sinkhorn attention", columns, ("site", "ends on", "mask"), [rows])
    for site in sites:
        kind = "" if site["ends_in"] == "attention" else ", a plan alone,"
        yield f"{site['name']}{kind} is at {site['source']}"
        yield from reach(site)


def reach(site: dict[str, Any]) -> Iterator[str]:
    """Yield a line on where constants in a loop's divisors act, if it is not far from the samples."""
    carried = site["guarded"] and site.get("choice", {}).get("operator") in ("exact", "amortised")
    if site["reach"] is not None and site["reach"] < FAR and not carried:
        form = "which the exact form carries" if site["guarded"] else "which no operator carries"
        where = f"more than {site['reach']:g} times those of the samples" if site["reach"] > 1 else "the samples"
        constant = f"{site['name']} keeps its divisors from zero by a constant, {form}"
        yield f"{constant}: it changes the plan on scores of {where}"


def more_samples(name: str, choice: dict[str, Any]) -> Iterator[str]:
    """Yield a line on what more calibration samples would do for an operator, if that is worth it."""
    if (share := choice["doubling"] or 0.0) >= WORTHWHILE:
        gain = f"twice as many take about {share:.0%} off the error of its estimate"
        yield f"{name} would gain from more calibration samples, which need no labels: {gain}"


def near_misses(misses: list[dict[str, Any]]) -> Iterator[str]:
    """Show the near misses, with the reason why each is none."""
    for miss in misses:
        where = f"{miss['source'] or 'no source line'} (node {miss['node']})"
        yield f"miss: {where}: {miss['reason']}; {miss['hint']}"


def early_stops(data: dict[str, Any] | None) -> Iterator[str]:
    """Show what omitting the early stops of a model changes, where it has any."""
    from asapc.writing.report import early_stop_note

    if note := early_stop_note(data):
        yield f"Captured {note}"


def compilation(folder: Path, data: dict[str, Any]) -> Iterator[Grid | str]:
    """Show the report of `compile`: tables, what they say in words, and where the files are."""
    fidelity, latency = data["fidelity"], data["latency"]
    yield data["verdict"]["headline"]
    yield closest_budget(data["verdict"])
    yield output_errors(fidelity)
    yield choices_grid(data["sites"])
    yield from why_not_shorter(data["sites"])
    for site in data["sites"]:
        yield from reach(site)
        yield from more_samples(site["name"], site["choice"])
    yield bill_grid(data["sites"])
    if note := cheaper_note(data):
        yield note[0].upper() + note[1:]
    yield latency_grid(data)
    yield from on_gpu(data)
    yield from early_stops(data["early_stops"])
    yield f"Ratios at batch {latency['batch']}: {comparison(latency)}"
    yield from (f"warning: {line}" for line in latency["warnings"])
    yield cost_check(data["costs"])
    for hop in fidelity["hops"]:
        yield f"  {hop['name']:<13} changes the outputs by {hop['rel']:.1e} relative, {hop['max_abs']:.1e} at most"
    for artifact in data["artifacts"]:
        targets = f" for {', '.join(artifact['targets'])}" if artifact["targets"] else ""
        yield f"{folder / artifact['path']}  ({artifact['builder']}{targets})"
    yield from (str(folder / name) for name in ("report.json", "report.html"))


def compiled_folder(folder: Path, data: dict[str, Any]) -> Iterator[Grid | str]:
    """Show what a compiled folder consists of: its sites, its files, and the layers of its engine by site."""
    yield data["verdict"]["headline"]
    yield choices_grid(data["sites"])
    for artifact in data["artifacts"]:
        targets = f" for {', '.join(artifact['targets'])}" if artifact["targets"] else ""
        yield f"{folder / artifact['path']}  ({artifact['builder']}{targets})"
    engine = data["engine"]
    if engine["status"] != "built":
        yield f"no engine: {engine['reason'] or 'none was asked for'}"
    elif not engine["layers"]:
        yield "the engine's builder listed no layers"
    else:
        yield layers_grid(engine["layers"])
        yield from (fusion(site, engine["layers"]) for site in data["sites"])


def layers_grid(layers: list[dict[str, Any]]) -> Grid:
    """Show the layers of an engine."""
    rows: list[Row] = [
        (
            str(number),
            layer["kind"],
            " ".join(layer["precision"]),
            ", ".join(layer["sites"]) or ", ".join(layer["modules"]),
            layer["name"],
        )
        for number, layer in enumerate(layers, 1)
    ]
    columns = ("", "kind", "types", "site or module", "layer")
    return Grid("Engine", columns, columns[1:], [rows])


def fusion(of_site: dict[str, Any], layers: list[dict[str, Any]]) -> str:
    """Return a line on what became of a site in an engine."""
    site, own = of_site["name"], [layer for layer in layers if of_site["name"] in layer["sites"]]
    fused = sum(layer["attention"] for layer in own)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(layer["kind"] for layer in own).items())
    attention = f"attention as one kernel in {fused}" if fused else "no attention as one kernel"
    if of_site["choice"]["operator"] == "keep":
        return f"{site} stays as it was written, and its layers are not told from others of its module"
    if not own:
        return f"{site} is in no layer of the engine by itself"
    return f"{site} is in {len(own)} layers of the engine ({kinds}): {attention}"


def verification(data: dict[str, Any]) -> Iterator[Grid | str]:
    """Show the fidelity of a compiled model on other samples, site by site and whole."""
    yield data["verdict"]["headline"]
    if data["sites_note"]:
        yield data["sites_note"]
    fidelity = data["fidelity"]
    rows: list[Row] = [(site["name"], *site_errors(site), outside_share(site)) for site in data["sites"]]
    if rows:
        columns = ("site", "relc", "col error", "outside calibration")
        yield Grid("Sinkhorn attention", columns, ("site",), [rows])
    yield from filter(None, (outside_note(site, fidelity["samples"]) for site in data["sites"]))
    yield f"{fidelity['samples']} samples: {output_errors(fidelity)}"
    if fidelity["agreement"] is not None:
        yield f"agreement with the teacher {fidelity['agreement']:.4f}"
    if (metric := fidelity["metric"]) is not None:
        yield f"{metric['name']} {metric['compiled']:.4f}, of the teacher {metric['teacher']:.4f}"


def tradeoffs(data: dict[str, Any]) -> Iterator[Grid | str]:
    """Show the front of a model, and which budget gives which row."""
    has_classes = data["rows"][0]["reached"]["agreement"] is not None
    metric, head = ("agreement", "agree") if has_classes else ("output-error", "error")
    rows: list[Row] = [
        (
            ("* " if row["chosen"] else "") + kinds(row["sites"]),
            fixed(row["estimated_ms"], 2),
            fixed(row["times_softmax"], 2),
            fixed(row["times_exact"], 2),
            fixed(row["reached"][metric]),
            fixed(row["calibration_relc"]),
            row["fidelity"] or "",
        )
        for row in data["rows"]
    ]
    title = f"Budgets: ms at batch {data['batch']}, and times softmax and exact form, by estimate"
    columns = ("operators", "ms", "softmax", "exact", head, "relc", "--fidelity")
    yield Grid(title, columns, ("operators",), [rows])
    yield (
        f"Times by the costs of {data['costs']['model']}, {data['costs']['device']}; {metric} on "
        f"{data['samples']} held-out samples, relc of the worst site on calibration samples"
    )
    for row in data["rows"]:
        if row["chosen"]:
            for name, choice in row["sites"].items():
                yield from more_samples(name, choice)
    yield "* is what `asapc compile` takes with the same options; with the --fidelity of another row it takes that one"


def approximation(title: str, rows: list[dict[str, Any]]) -> Grid:
    """Show the networks of `approx` beside other approximations of as many weights or pieces."""
    cells: list[Row] = [
        (
            row["name"],
            "" if row["pieces"] is None else str(row["pieces"]),
            f"{row['largest']:.2e}",
            f"{row['mse']:.2e}",
            "" if row["mean_mse"] is None else f"{row['mean_mse']:.2e}",
        )
        for row in rows
    ]
    columns = ("approximation", "pieces", "largest error", "MSE, best", "MSE, mean")
    return Grid(title, columns, ("approximation",), [cells])


def choices_grid(sites: list[dict[str, Any]]) -> Grid:
    """Show sites as `compile` lists them: the operator of each, and its errors."""
    rows: list[Row] = [
        (
            site["name"],
            size(site),
            f"{site['half_steps']} -> {site['choice']['half_steps']}",
            label(site["choice"]),
            *site_errors(site),
        )
        for site in sites
    ]
    columns = ("site", "N x M", "half-steps", "operator", "relc", "col error")
    return Grid("Sinkhorn attention", columns, ("site", "operator"), [rows])


def why_not_shorter(sites: list[dict[str, Any]]) -> Iterator[str]:
    """Yield why sites keep all half-steps, where that was not what -O0 or -O1 asked for."""
    names: dict[str, list[str]] = {}
    for site in sites:
        choice = site["choice"]
        if choice["operator"] in ("exact", "keep") and not choice["reason"].startswith("-O"):
            names.setdefault(choice["reason"], []).append(site["name"])
    for reason, of_reason in names.items():
        which = f"{' and '.join(of_reason[:2])}{' and others' * (len(of_reason) > 2)}"
        yield f"{which} keep{'s' * (len(of_reason) == 1)} all half-steps: {reason}"


def bill_grid(sites: list[dict[str, Any]]) -> Grid:
    """Show cost and error of each choice and of its neighbours on the front; report.json has the whole front."""
    title = "What else there was, by estimate and on calibration samples"
    return Grid(title, ("site", "operator", "half-steps", "ms", "relc"), ("site", "operator"), list(map(bill, sites)))


def bill(site: dict[str, Any]) -> list[Row]:
    """Make the rows of one site in that table."""
    choice = {key: value for key, value in site["choice"].items() if key not in ("reason", "front")}
    front = site["choice"]["front"]
    at = front.index(choice) if choice in front else len(front) - 1
    near = front[max(at - 1, 0) : at + 2]
    near += [candidate for candidate in front[-1:] if candidate not in near]
    return [
        (
            "" if row else site["name"],
            label(candidate) + ("  <- chosen" if candidate == choice else ""),
            str(candidate["half_steps"]),
            fixed(candidate["estimated_ms"], 2),
            "" if candidate["calibration_relc"] is None else f"{candidate['calibration_relc']:.2g}",
        )
        for row, candidate in enumerate(near)
    ]


def latency_grid(data: dict[str, Any]) -> Grid:
    """Show latency and fidelity of every variant, a group for each batch size."""
    latency, variants = data["latency"], data["fidelity"]["variants"]
    ratios = {(ratio["name"], ratio["batch"]): ratio for ratio in latency["ratios"]}
    groups: dict[int, list[Row]] = {}
    for run in latency["runs"]:
        variant = variants[run["name"]]
        row: Row = (
            str(run["batch"]),
            run["name"],
            *(fixed(run[key], 2) for key in ("p50_ms", "p90_ms", "p99_ms")),
            plus_minus(ratios.get((run["name"], run["batch"]))),
            fixed(variant["agreement"]),
            fixed(variant["metric"]),
        )
        groups.setdefault(run["batch"], []).append(row)
    threads = f"{latency['threads']} thread{'s' * (latency['threads'] != 1)}"
    title = f"Latency in ONNX Runtime, ms a batch, {threads}, {latency['device']}"
    columns = ("batch", "variant", "median", "p90", "p99", "x compiled", "agreement", "accuracy")
    return Grid(title, columns, ("variant",), list(groups.values()))


def on_gpu(data: dict[str, Any]) -> Iterator[Grid | str]:
    """Show the latency on a GPU, or why an engine that was built was not run."""
    if (reason := data["engine"]["not_run"]) is not None:
        yield f"The engine was built and not run: {reason}"
    gpu = data["latency"]["gpu"]
    if gpu is None:
        return
    rows: list[Row] = [
        (str(run["batch"]), run["runtime"], *(fixed(run[key], 3) for key in ("p50_ms", "p90_ms", "p99_ms")))
        for run in gpu["runs"]
    ]
    title = f"Compiled, on the GPU, ms a batch, {gpu['device']}" + ("" if gpu["settled"] else ", speed not settled")
    yield Grid(title, ("batch", "runtime", "median", "p90", "p99"), ("runtime",), [rows])
    yield from gpu["notes"]


def plus_minus(ratio: dict[str, Any] | None, digits: int = 2) -> str:
    """Format a ratio with half its interval; None, of a model to itself, as nothing."""
    if ratio is None:
        return ""
    if ratio["finding"] == "identical":
        return "same graph"
    return f"{fixed(ratio['value'], digits)} ±{fixed((ratio['high'] - ratio['low']) / 2, digits)}"


def closest_budget(verdict: dict[str, Any]) -> str:
    """Return a line with the terms that a model just keeps."""
    terms = " ".join(f"'{term['closest']}'" for term in verdict["terms"] if term["closest"] is not None)
    return f"the closest budget that it keeps: {terms}"


def comparison(latency: dict[str, Any]) -> str:
    """Return in words how fast the compiled model is beside its rivals."""
    rivals = {
        "teacher": "the teacher",
        "exact": "the best exact form",
        "truncated": "truncated Sinkhorn of as many half-steps",
        "softmax": "softmax attention",
    }
    ratios = {ratio["name"]: ratio for ratio in latency["ratios"] if ratio["batch"] == latency["batch"]}
    return "compiled is " + ", ".join(beside(ratios[name], label) for name, label in rivals.items())


def beside(ratio: dict[str, Any], rival: str) -> str:
    """Return in words how fast the compiled model is beside one rival, whose time over its own is given."""
    match ratio["finding"]:
        case "identical":
            return f"the same graph as {rival}"
        case "not significantly different":
            return f"not significantly faster or slower than {rival}"
        case _:
            return f"{ratio['value']:.2f}x as fast as {rival}"


def size(site: dict[str, Any]) -> str:
    """Format queries by keys."""
    return f"{site['queries']} x {site['keys']}"


def site_errors(site: dict[str, Any]) -> tuple[str, str]:
    """Format the two errors of a site, empty where it was not compared."""
    errors = site["fidelity"] or {"relc": None, "column_marginal_error": None}
    return fixed(errors["relc"]), fixed(errors["column_marginal_error"])


def epsilon(site: dict[str, Any]) -> str:
    """Format the temperature of a site: a range where heads differ, a dash where its scores are no q.k."""
    values = site["epsilon"]
    if values is None:
        return "-"
    return f"{min(values):.3g} ... {max(values):.3g}" if isinstance(values, list) else f"{values:.4g}"
