"""The `asapc` command: parse, call the library, show what it returns. No decisions are made here."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from asapc.config import CompileConfig
from asapc.errors import AsapcError, InternalError, OptionError
from asapc.events import Event, StageAdvanced, StageDone, StageStarted
from asapc.types.budget import SITE_METRICS
from asapc.version import __version__

app = typer.Typer(
    name="asapc",
    help="The compiler for doubly-stochastic attention: trained Sinkhorn models to ONNX and TensorRT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ROW_COLUMNS = "approximation|pieces|largest error|MSE, best|MSE, mean"
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn exceptions into the exit codes of `asapc.errors`, with one message and one hint."""
    try:
        yield
    except AsapcError as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        err.print(f"hint: {error.hint}", markup=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        err.print("interrupted; nothing was written")
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except Exception:
        err.print_exception()
        err.print("This is a defect in asapc. Please report it with the lines above and the command.")
        raise typer.Exit(InternalError.exit_code) from None


# Options of both commands that read a model.
ModelFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="Checkpoint, weights (with --model) or torch.export archive.")
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FACTORY",
        help="Class or function that builds the model of which FILE holds the weights; the working directory is "
        "importable.",
        show_default=False,
    ),
]
ModelArgs = Annotated[
    str | None,
    typer.Option(help="Keyword arguments of --model: a JSON object, or a file with one.", show_default=False),
]
Inputs = Annotated[
    Path | None,
    typer.Option(help="Example inputs, .npz or .pt, to look into the model with.", show_default=False),
]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=SIZES:DTYPE",
        help="Random example inputs instead, e.g. x=2,197,64:float32, mask=2,197:bool, ids=2,128:int64:0..30000 (both "
        "included, 0..1 by default); repeat for each input. Never used for calibration.",
        show_default=False,
    ),
]
UnsafeLoad = Annotated[
    bool,
    typer.Option(
        "--unsafe-load",
        help="Read a pickled module or other Python objects. This runs code that stands in FILE, with your rights: "
        "only for files that you would run as a program.",
    ),
]
BUDGET = "Term of the budget: agreement>=X, metric-drop<=POINTS, relc<=X or column-marginal<=X."
Fidelity = Annotated[list[str] | None, typer.Option(help=BUDGET, show_default="agreement>=0.98, relc<=0.08")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(help="TOML file of options; those on the command line win.", show_default=False),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Print the version where asked; the commands do the rest."""
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command("compile")
def compile_command(
    file: ModelFile,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Output folder.", show_default="<name>.asap")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")] = False,
    calib: Annotated[
        Path | None,
        typer.Option(
            help="Calibration samples, .npz or .pt: arrays named as the model's inputs, and optional labels.",
            show_default="those in the checkpoint",
        ),
    ] = None,
    model: ModelName = None,
    model_args: ModelArgs = None,
    inputs: Inputs = None,
    input_shape: InputShape = None,
    unsafe_load: UnsafeLoad = False,
    fidelity: Fidelity = None,
    level: Annotated[
        int | None,
        typer.Option(
            "-O",
            metavar="LEVEL",
            help="0 leaves the loops as written, 1 rewrites them exactly, 2 approximates within the budget.",
            show_default="2",
        ),
    ] = None,
    early_stop: Annotated[
        str | None,
        typer.Option(
            metavar="bound|refuse",
            help="What to do with loops that stop early on the calibration samples: take them to their bound, or "
            "refuse the model.",
            show_default="bound",
        ),
    ] = None,
    lowering: Annotated[
        str | None,
        typer.Option(
            metavar="auto|materialised|fused",
            help="What operators become: whatever is cheapest, standard ONNX operators on a matrix of scores, or the "
            "runtime's fused attention.",
            show_default="auto",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="float32|float16|bfloat16",
            help="Precision of the engine's layers and products; duals and exponentials stay in float32.",
            show_default="float32",
        ),
    ] = None,
    relu_activations: Annotated[
        float | None,
        typer.Option(
            metavar="ERROR",
            help="Put ReLU networks in the place of GELU and other smooth activations, each off by no more than this.",
            show_default="leave them alone",
        ),
    ] = None,
    dynamic: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS=LOW:HIGH,...",
            help="Open axes of the inputs: batch=1:64, seq=16:2048 for the second axis, or INPUT.AXIS=LOW:HIGH.",
            show_default="the batch alone",
        ),
    ] = None,
    slices: Annotated[
        list[int] | None,
        typer.Option(help="Sorted slices that the planner may give a site; repeat to add.", show_default="0"),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size to measure; repeat to add.", show_default="1 and 32")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Time to measure each batch size.", show_default="10")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch and ONNX Runtime.", show_default="all cores")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.", show_default="0")] = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report alone, as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Compile a trained checkpoint and report what it costs and gains."""
    with exit_codes():
        from asapc.commands.compile import compile_model
        from asapc.commands.share import share_calibration
        from asapc.planning.distributed import processes

        given: dict[str, Any] = {
            "out": out_folder,
            "force": force or None,
            "calib": calib,
            **loading_options(model, model_args, inputs, input_shape, unsafe_load),
            "fidelity": tuple(fidelity) if fidelity else None,
            "level": level,
            "early_stop": early_stop,
            "lowering": lowering,
            "precision": precision,
            "relu_activations": relu_activations,
            "dynamic": dynamic,
            "slices": tuple(slices) if slices else None,
            "batches": tuple(batch) if batch else None,
            "seconds": seconds,
            "threads": threads,
            "seed": seed,
        }
        options = options_of(config, given)
        warn_of_unsafe_load(file, options)
        with processes() as rank, stages(shown=not quiet and rank == 0) as on_event:
            if rank > 0:
                share_calibration(file, options)
                return
            report = compile_model(file, options, on_event)
        if as_json:
            sys.stdout.write(json.dumps(report.data, indent=2) + "\n")
        elif not quiet:
            show_report(report.folder, dict(report.data))


@app.command()
def inspect(
    file: ModelFile,
    calib: Annotated[
        Path | None, typer.Option(help="Samples to probe with.", show_default="those in the checkpoint")
    ] = None,
    model: ModelName = None,
    model_args: ModelArgs = None,
    inputs: Inputs = None,
    input_shape: InputShape = None,
    unsafe_load: UnsafeLoad = False,
    config: ConfigFile = None,
    why: Annotated[bool, typer.Option("--why", help="Show what came near and was turned down.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """List the Sinkhorn attention of a checkpoint."""
    with exit_codes():
        from asapc.commands.inspect import inspect_model, require_sites
        from asapc.writing.report import early_stop_data, miss_data, site_data

        given = {"calib": calib, **loading_options(model, model_args, inputs, input_shape, unsafe_load)}
        options = options_of(config, given)
        warn_of_unsafe_load(file, options)
        with stages(shown=True) as on_event:
            findings = inspect_model(file, options, on_event)
        sites, misses = [site_data(s) for s in findings.sites], [miss_data(m) for m in findings.misses]
        stops = early_stop_data(findings.early_stops)
        if as_json:
            data = {"schema": "asapc.inspect/1", "sites": sites, "misses": misses, "early_stops": stops}
            sys.stdout.write(json.dumps(data, indent=2) + "\n")
        elif sites:
            out.print(found_table(sites))
            for site in sites:
                kind = "" if site["ends_in"] == "attention" else ", a plan alone,"
                out.print(f"{site['name']}{kind} stands at {site['source']}", markup=False, soft_wrap=True)
        if not as_json:
            show_early_stops(stops)
        if why and not as_json:
            for miss in misses:
                where = f"{miss['source'] or 'no source line'} (node {miss['node']})"
                out.print(f"miss: {where}: {miss['reason']}; {miss['hint']}", markup=False, soft_wrap=True)
        require_sites(findings, file, listed=why or as_json)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `asapc compile` wrote.")],
    data: Annotated[Path, typer.Option(help="Samples, .npz or .pt, with labels if there are any.", show_default=False)],
    teacher: Annotated[
        Path | None, typer.Option(help="The model that was compiled.", show_default="where the report says it was")
    ] = None,
    outputs: Annotated[
        Path | None,
        typer.Option(
            help="What the teacher returned for these samples, .npz or .pt, to compare with in its place: an array for "
            "each output, in their order.",
            show_default=False,
        ),
    ] = None,
    model: ModelName = None,
    model_args: ModelArgs = None,
    unsafe_load: UnsafeLoad = False,
    fidelity: Annotated[
        list[str] | None, typer.Option(help=BUDGET, show_default="what the model was compiled to keep")
    ] = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Compare a compiled model with its teacher again, on other samples."""
    with exit_codes():
        from asapc.commands.verify import recheck, recheck_stored
        from asapc.fidelity.budget import check_budget

        given = {
            **loading_options(model, model_args, None, None, unsafe_load),
            "fidelity": tuple(fidelity) if fidelity else None,
        }
        options = options_of(config, given)
        if outputs is None:
            warn_of_unsafe_load(teacher or folder, options)
            found = recheck(folder, data, teacher, options)
        else:
            of_sites = [str(bound) for bound in options.bounds() if bound.metric in SITE_METRICS]
            if teacher is not None or of_sites:
                raise OptionError(
                    f"stored outputs tell nothing about {', '.join(of_sites) or 'the teacher'}",
                    "leave out --outputs, or what needs the teacher itself",
                )
            found = recheck_stored(folder, data, outputs)
        if as_json:
            sys.stdout.write(json.dumps(found.data(), indent=2) + "\n")
        else:
            show_recheck(found.data())
        check_budget(found.fidelity, options.bounds() or found.budget)


@app.command()
def approx(
    expression: Annotated[
        str, typer.Argument(metavar="FUNCTION", help='Of x, such as "x**3" or "tanh(3*x)".', show_default=False)
    ],
    depth: Annotated[int, typer.Option(help="Hidden layers of width 4, each of which doubles the pieces.")] = 5,
    domain: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Interval of x.")] = "0,1",
    points: Annotated[int, typer.Option(help="Equally spaced points to fit and to take errors on.")] = 500,
    runs: Annotated[int, typer.Option(help="Independent starts.")] = 30,
    out_file: Annotated[Path, typer.Option("--out", help="ONNX file to write.")] = Path("approx.onnx"),
    plot: Annotated[Path | None, typer.Option(help="Picture to draw, .png, .svg or .pdf.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the starts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Approximate a function by a ReLU network with exponentially many linear pieces."""
    with exit_codes(), ExitStack() as files:
        from asapc.relu.approx import approximate, parse_interval, save_onnx, save_plot
        from asapc.writing.folder import output_file

        interval = parse_interval(domain)
        network_file = files.enter_context(output_file(out_file, force))
        plot_file = None if plot is None else files.enter_context(output_file(plot, force))
        with err.status(f"fitting {runs} networks at each depth up to {depth}"):
            found = approximate(expression, depth, interval, points, runs, seed)
        save_onnx(found, network_file)
        if plot_file is not None:
            save_plot(found, plot_file, expression)
        if as_json:
            sys.stdout.write(json.dumps(found.data(), indent=2) + "\n")
            return
        made = table(f"{expression} on {domain}, {points} points, {runs} runs", ROW_COLUMNS, ("approximation",))
        for row in found.rows:
            made.add_row(
                row.name,
                "" if row.pieces is None else str(row.pieces),
                f"{row.largest:.2e}",
                f"{row.mse:.2e}",
                "" if row.mean_mse is None else f"{row.mean_mse:.2e}",
            )
        out.print(made)
        for path in filter(None, (out_file, plot)):
            out.print(str(path), markup=False, soft_wrap=True)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="digits", help="What to train.", show_default=False)],
    out_file: Annotated[Path, typer.Option("--out", help="Checkpoint to write.")] = Path("model.pt"),
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint if it exists.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 70,
) -> None:
    """Train a model with Sinkhorn attention, and its softmax twin for comparison."""
    with exit_codes():
        from asapc.models import digits
        from asapc.writing.folder import output_file

        if recipe != "digits":
            raise OptionError(f"there is no recipe {recipe!r}", "train digits")
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with (
            output_file(out_file, force) as partial,
            Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err) as progress,
        ):
            tasks = {name: progress.add_task(name, total=epochs) for name in digits.VARIANTS}

            def on_epoch(name: str, done: int, loss: float) -> None:
                progress.update(tasks[name], completed=done, description=f"{name}  loss {loss:.3f}")

            checkpoint = digits.train(seed, epochs, on_epoch)
            digits.save(checkpoint, partial)
        facts = checkpoint["training"]
        out.print(
            f"{out_file}: held-out accuracy {facts['held_out_accuracy']:.1%} on {digits.HELD_OUT} images, "
            f"softmax twin {facts['softmax_twin_accuracy']:.1%}"
        )


def loading_options(
    model: str | None, model_args: str | None, inputs: Path | None, shapes: list[str] | None, unsafe_load: bool
) -> dict[str, Any]:
    """The options that say how to read a model, None where they are not given."""
    return {
        "model": model,
        "model_args": model_args,
        "inputs": inputs,
        "input_shape": tuple(shapes) if shapes else None,
        "unsafe_load": unsafe_load or None,
    }


def options_of(config: Path | None, given: dict[str, Any]) -> CompileConfig:
    """The options of a TOML file, overwritten by those that are given on the command line."""
    base = CompileConfig.from_toml(config) if config else CompileConfig()
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def warn_of_unsafe_load(file: Path, options: CompileConfig) -> None:
    """Say what is about to happen, before it does."""
    if options.unsafe_load:
        err.print(f"warning: --unsafe-load runs code that stands in {file}", style="yellow", markup=False)


@contextmanager
def stages(shown: bool) -> Iterator[Callable[[Event], None]]:
    """Show events on stderr: a spinner for the running stage, a line with its time for each that is done."""
    if not shown:
        yield lambda event: None
        return
    with err.status("") as status:

        def on_event(event: Event) -> None:
            match event:
                case StageStarted(stage):
                    status.update(stage)
                case StageAdvanced(stage, detail):
                    status.update(f"{stage}  {detail}")
                case StageDone(stage, seconds, detail):
                    err.print(f"  {stage:<8} {seconds:6.1f} s  {detail}", markup=False, soft_wrap=True)

        yield on_event


def show_report(folder: Path, data: dict[str, Any]) -> None:
    """Print the tables, what they say in words, and where the files are."""
    out.print(choices_table(data["sites"]))
    out.print(bill_table(data["sites"]))
    out.print(latency_table(data))
    fidelity, latency = data["fidelity"], data["latency"]
    show_early_stops(data["early_stops"])
    out.print(f"Ratios at batch {latency['batch']}: {comparison(latency)}", soft_wrap=True)
    for hop in fidelity["hops"]:
        out.print(f"  {hop['name']:<13} changes the outputs by {hop['rel']:.1e} relative, {hop['max_abs']:.1e} at most")
    for artifact in data["artifacts"]:
        targets = f" for {', '.join(artifact['targets'])}" if artifact["targets"] else ""
        out.print(f"{folder / artifact['path']}  ({artifact['builder']}{targets})", markup=False, soft_wrap=True)
    out.print(f"{folder / 'report.json'}", markup=False, soft_wrap=True)


def show_recheck(data: dict[str, Any]) -> None:
    """Print the fidelity of a compiled model on other samples, whole and site by site."""
    fidelity = data["fidelity"]
    made = table("Sinkhorn attention", "site|relc|col error|outside calibration", ("site",))
    for site in data["sites"]:
        cost = site["fidelity"]
        made.add_row(
            site["name"],
            "" if cost is None else f"{cost['relc']:.3f}",
            "" if cost is None else f"{cost['column_marginal_error']:.3f}",
            f"{site['outside_calibration']:.1%}" + (" (shifted)" if site["shifted"] else ""),
        )
    if data["sites"]:
        out.print(made)
    out.print(f"{fidelity['samples']} samples: logits differ by {fidelity['logits_rel']:.2%}")
    if fidelity["agreement"] is not None:
        out.print(f"agreement with the teacher {fidelity['agreement']:.4f}")
    if (metric := fidelity["metric"]) is not None:
        out.print(f"{metric['name']} {metric['compiled']:.4f}, of the teacher {metric['teacher']:.4f}")


def show_early_stops(data: dict[str, Any] | None) -> None:
    """Print what capturing without the early stops of a model changes, where it has any."""
    from asapc.writing.report import early_stop_note

    if note := early_stop_note(data):
        out.print(f"Captured {note}", markup=False, soft_wrap=True)


def table(title: str, columns: str, left: tuple[str, ...]) -> Table:
    """An empty table; columns are separated by "|" and aligned right but for those named in `left`."""
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns.split("|"):
        # Words give way to numbers where the terminal is narrow.
        text = name in left
        made.add_column(name, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    return made


def found_table(sites: list[dict[str, Any]]) -> Table:
    """Sites as `inspect` shows them."""
    columns = "site|T|ends on|epsilon|heads|N x M|mask|time"
    made = table("Sinkhorn attention", columns, ("site", "ends on", "mask"))
    for site in sites:
        made.add_row(
            site["name"],
            str(site["half_steps"]),
            site["last"],
            epsilon(site),
            str(site["heads"]),
            f"{site['queries']} x {site['keys']}",
            "yes" if site["masked"] else "no",
            f"{site['share']:.0%}",
        )
    return made


def choices_table(sites: list[dict[str, Any]]) -> Table:
    """Sites as `compile` shows them: what was chosen, and what it costs."""
    made = table("Sinkhorn attention", "site|N x M|half-steps|operator|relc|col error", ("site", "operator"))
    for site in sites:
        choice, cost = site["choice"], site["fidelity"]
        made.add_row(
            site["name"],
            f"{site['queries']} x {site['keys']}",
            f"{site['half_steps']} -> {choice['half_steps']}",
            named(choice),
            "" if cost is None else f"{cost['relc']:.3f}",
            "" if cost is None else f"{cost['column_marginal_error']:.3f}",
        )
    return made


def bill_table(sites: list[dict[str, Any]]) -> Table:
    """What the neighbours of each choice would have cost and given; all of them stand in report.json."""
    made = table(
        "What else there was, by estimate and on calibration samples",
        "site|operator|half-steps|ms|relc",
        ("site", "operator"),
    )
    for site in sites:
        choice = site["choice"]
        chosen = {key: value for key, value in choice.items() if key not in ("reason", "front")}
        front = choice["front"]
        at = front.index(chosen) if chosen in front else len(front) - 1
        near = front[max(at - 1, 0) : at + 2]
        for candidate in [*near, *(c for c in front[-1:] if c not in near)]:
            made.add_row(
                site["name"] if candidate is near[0] else "",
                named(candidate) + ("  <- chosen" if candidate == chosen else ""),
                str(candidate["half_steps"]),
                "" if candidate["estimated_ms"] is None else f"{candidate['estimated_ms']:.2f}",
                "" if candidate["calibration_relc"] is None else f"{candidate['calibration_relc']:.2g}",
                end_section=candidate is front[-1],
            )
    return made


def named(candidate: dict[str, Any]) -> str:
    """An operator with what sets it apart."""
    more = [f"{candidate['slices']} slices"] if candidate["slices"] else []
    more += ["hinges"] if "hinges" in candidate["features"] else []
    more += [candidate["side"]] if candidate["side"] else []
    more += ["fused"] if candidate["lowering"] == "fused" else []
    return ", ".join([candidate["operator"], *more])


def epsilon(site: dict[str, Any]) -> str:
    """Temperature of a site, or the range of its heads' temperatures, or a dash where its scores are no q.k."""
    values = site["epsilon"]
    if values is None:
        return "-"
    return f"{min(values):.3g} ... {max(values):.3g}" if isinstance(values, list) else f"{values:.4g}"


def latency_table(data: dict[str, Any]) -> Table:
    """Latency and fidelity of every variant, at every batch size."""
    latency, fidelity = data["latency"], data["fidelity"]
    p50 = {(run["name"], run["batch"]): run["p50_ms"] for run in latency["runs"]}
    made = table(
        f"Latency in ONNX Runtime, ms a batch, {latency['threads']} threads, {latency['device']}",
        "batch|variant|median|p90|p99|x compiled|agreement|accuracy",
        ("variant",),
    )
    for run in latency["runs"]:
        variant = fidelity["variants"][run["name"]]
        made.add_row(
            str(run["batch"]),
            run["name"],
            *(f"{run[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
            f"{run['p50_ms'] / p50['compiled', run['batch']]:.2f}",
            "" if variant["agreement"] is None else f"{variant['agreement']:.3f}",
            "" if variant["metric"] is None else f"{variant['metric']:.3f}",
            end_section=run["name"] == latency["runs"][-1]["name"],
        )
    return made


def comparison(latency: dict[str, Any]) -> str:
    """Say in words which rivals the compiled model beats and which it loses to."""
    return (
        f"compiled is {latency['speedup_vs_teacher']:.1f}x as fast as the teacher, "
        f"{latency['speedup_vs_exact']:.2f}x as fast as the best exact form, "
        f"{latency['speedup_vs_truncated']:.2f}x as fast as truncated Sinkhorn of as many half-steps, "
        f"and takes {latency['ratio_to_softmax']:.2f}x the time of softmax attention."
    )


class Interrupted(KeyboardInterrupt):
    """Ctrl-C under a name of its own.

    Where a plain KeyboardInterrupt passes through `exec` of a string, as in the making of a dataclass, Python under
    `-m` remembers it and dies of SIGINT at the end, whoever has caught it.
    """


def interrupt(*_: object) -> NoReturn:
    """Handle SIGINT."""
    raise Interrupted


def main() -> None:
    """Entry point of the `asapc` command."""
    # Left alone where it is ignored, as by a shell for its background jobs.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    app()


if __name__ == "__main__":
    main()
