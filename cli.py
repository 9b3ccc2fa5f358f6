"""The `asapc` command: parse, call the library, show what it returns. No decisions are made here."""

import functools
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from asapc import showing
from asapc.cli_serving import package as package
from asapc.cli_serving import run as run
from asapc.cli_timing import bench as bench
from asapc.cli_timing import check as check
from asapc.cli_training import eval as eval
from asapc.cli_training import train as train
from asapc.config import OPTIONS, CompileConfig
from asapc.errors import OptionError
from asapc.process import interrupts
from asapc.process.streams import open_missing
from asapc.terminal import (
    BUDGET_MISSED,
    ENDS,
    LATENCY_ENDS,
    Json,
    a_number,
    app,
    command,
    err,
    out,
    print_json,
    say,
    show,
    stages,
)
from asapc.version import __version__

# What `tradeoffs` shares with `compile`: all but outputs, the engine, and how latency is measured.
PLANNING = [
    *("calib", "fidelity", "model", "model_args", "weights", "inputs", "input_shape", "unsafe_load", "early_stop"),
    *("target", "precision", "costs", "no_cache", "lowering", "dynamic", "operators", "slices", "pieces", "batches"),
    *("threads", "seed"),
]
READS = [OPTIONS[name] for name in ("model", "model_args", "weights", "inputs", "input_shape", "unsafe_load")]
ModelFile = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="Checkpoint, weights (with --model), torch.export archive (.pt2) or ONNX."),
]
a_file = functools.partial(typer.Option, metavar="FILE")


@app.callback(invoke_without_command=True, epilog=ENDS.format(BUDGET_MISSED + LATENCY_ENDS))
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Print the version where asked; the commands do the rest."""
    if version:
        out.print(__version__)
        raise typer.Exit


@command(
    "asapc compile model.pt --calib samples.npz --fidelity 'agreement>=0.99'",
    "asapc compile weights.safetensors --model my_models:build --calib samples.npz",
    takes=OPTIONS.values(),
    ends=BUDGET_MISSED,
)
def compile(
    file: ModelFile,
    options: CompileConfig,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Compile a trained checkpoint and report what it costs and gains."""
    from asapc.commands.compile import compile_model
    from asapc.commands.share import share_calibration
    from asapc.planning.distributed import processes

    warn_of_unsafe_load(file, options)
    with processes() as rank, stages(visible=not quiet and rank == 0) as on_event:
        if rank > 0:
            share_calibration(file, options)
            return
        report = compile_model(file, options, on_event)
    if report.data["engine"]["status"] == "failed" and not quiet:
        say(err, f"warning: no engine was built: {report.data['engine']['reason']}", style="yellow")
        say(err, f"hint: {report.data['engine']['hint']}")
    if as_json:
        print_json(report.data)
    elif not quiet:
        show(showing.compilation(report.folder, dict(report.data)))


@command(
    "asapc inspect model.pt --why",
    "asapc inspect model.asap",
    takes=(OPTIONS["calib"], *READS),
)
def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Checkpoint, weights (with --model), .pt2 or ONNX; or the folder that `asapc compile` wrote.",
        ),
    ],
    options: CompileConfig,
    why: Annotated[bool, typer.Option("--why", help="Show near misses, and why each was refused.")] = False,
    as_json: Json = False,
) -> None:
    """List the Sinkhorn attention of a checkpoint, or what a compiled folder consists of."""
    from asapc.commands.inspect import inspect_folder, inspect_model, is_compiled, require_sites
    from asapc.writing.report import early_stop_data, miss_data, site_data

    if is_compiled(file):
        report = inspect_folder(file)
        print_json(report) if as_json else show(showing.compiled_folder(file, report))
        return
    warn_of_unsafe_load(file, options)
    with stages(visible=True) as on_event:
        findings = inspect_model(file, options, on_event)
    sites, misses = [site_data(s) for s in findings.sites], [miss_data(m) for m in findings.misses]
    stops = early_stop_data(findings.early_stops)
    if as_json:
        print_json({"schema": "asapc.inspect/1", "sites": sites, "misses": misses, "early_stops": stops})
    else:
        show(showing.inspection(sites))
        show(showing.early_stops(stops))
        if why:
            show(showing.near_misses(misses))
    require_sites(findings, file, shows_misses=why or as_json)


@command(
    "asapc tradeoffs model.pt",
    "asapc tradeoffs model.pt --calib samples.npz --plot front.png",
    takes=[OPTIONS[name] for name in PLANNING],
)
def tradeoffs(
    file: ModelFile,
    options: CompileConfig,
    plot: Annotated[Path | None, a_file(help="Picture to draw, .png, .svg or .pdf.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the picture if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Show what each fidelity budget would cost, without exporting anything."""
    from asapc.commands.tradeoffs import tradeoffs as find_tradeoffs
    from asapc.writing.folder import picture_file

    warn_of_unsafe_load(file, options)
    with nullcontext() if plot is None else picture_file(plot, force) as picture:
        with stages(visible=True) as on_event:
            result = find_tradeoffs(file, options, on_event)
        if picture is not None:
            result.draw(picture)
    if as_json:
        print_json(result.data)
    else:
        show([*showing.tradeoffs(dict(result.data)), *([str(plot)] if plot else [])])


@command(
    "asapc verify model.asap --data samples.npz",
    "asapc verify model.asap --data samples.npz --fidelity 'relc<=0.05' --json",
    takes=(
        replace(OPTIONS["fidelity"], default_text="what the model was compiled to keep"),
        *(OPTIONS[name] for name in ("model", "model_args", "weights", "unsafe_load")),
    ),
    ends=BUDGET_MISSED,
)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `asapc compile` wrote.")],
    options: CompileConfig,
    data: Annotated[Path, a_file(help="Samples, .npz, .npy or .pt, with labels if there are any.", show_default=False)],
    teacher: Annotated[
        Path | None, a_file(help="The model that was compiled.", show_default="where the report says it was")
    ] = None,
    outputs: Annotated[
        Path | None,
        a_file(
            help="What the teacher returned for these samples, .npz, .npy or .pt, to compare with instead: an array "
            "for each output, in their order.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a compiled model with its teacher again, on other samples."""
    from asapc.commands.verify import Verification, verify_model, verify_outputs

    def display(verification: Verification) -> None:
        if as_json:
            print_json(verification.data())
        else:
            show(showing.verification(verification.data()))

    if outputs is None:
        warn_of_unsafe_load(teacher or folder, options)
        verify_model(folder, data, teacher, options, display)
    elif teacher is not None:
        raise OptionError("stored outputs tell nothing about the teacher", "omit --outputs or --teacher")
    else:
        verify_outputs(folder, data, outputs, options, display)


@command("asapc report model.asap", "asapc report model.asap --markdown summary.md")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `asapc compile` wrote.")],
    html: Annotated[
        Path | None, a_file(help="Page to write, as report.html in the folder.", show_default=False)
    ] = None,
    markdown: Annotated[Path | None, a_file(help="Markdown to write, as for CI's summary.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Show the report of a compiled model again, or write it as a page."""
    from asapc.commands.report import read_report, render_report
    from asapc.writing.folder import write_texts

    compiled = read_report(folder)
    texts = {} if html is None else {html: render_report(compiled)}
    if markdown is not None:
        texts[markdown] = showing.markdown(showing.compilation(folder, dict(compiled.data)))
    write_texts(texts, force)
    if as_json:
        print_json(compiled.data)
    else:
        show(map(str, texts) if texts else showing.compilation(folder, dict(compiled.data)))


@command(
    "asapc costs --out costs.json",
    "asapc costs --target cuda --precision float16 --out gpu.json",
    takes=(
        replace(OPTIONS["target"], help="What to measure. onnx: the CPU; cuda: the GPU; auto: a GPU if there is one."),
        replace(OPTIONS["precision"], help="Precision of products, float32 or on a GPU float16."),
        OPTIONS["threads"],
    ),
)
def costs(
    options: CompileConfig,
    out_file: Annotated[Path, a_file("--out", help="File of costs to write.")] = Path("costs.json"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Measure for some minutes what operators take on this machine, for --costs of `asapc compile`."""
    from asapc.commands.costs import MAX_ERROR, measure_costs
    from asapc.writing.folder import output_file, write_json

    with output_file(out_file, force) as partial, stages(visible=True) as on_event:
        data = measure_costs(options, on_event)
        write_json(partial, data)
    error = f"estimates are off by {data['median_error']:.0%} in the median"
    if data["median_error"] > MAX_ERROR:
        say(err, f"warning: {error}; measure again when nothing else runs", style="yellow")
    say(out, f"{out_file}: costs of {data['device']}, {error}")


@command(
    "asapc approx 'x**3' --depth 5 --domain=-1,1 --out cube.onnx",
    "asapc approx 'tanh(3*x)' --depth 4 --plot tanh.png",
)
def approx(
    expression: Annotated[
        str, typer.Argument(metavar="FUNCTION", help='Of x, such as "x**3" or "tanh(3*x)".', show_default=False)
    ],
    depth: Annotated[int, a_number(help="Hidden layers of width 4, each of which doubles the pieces.")] = 5,
    domain: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Interval of x.")] = "0,1",
    points: Annotated[int, a_number(help="Equally spaced points to fit and to take errors on.")] = 500,
    runs: Annotated[int, a_number(help="Independent starts.")] = 30,
    out_file: Annotated[Path, a_file("--out", help="ONNX file to write.")] = Path("approx.onnx"),
    plot: Annotated[Path | None, a_file(help="Picture to draw, .png, .svg or .pdf.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    seed: Annotated[int, a_number(help="Seed of the starts.")] = 0,
    as_json: Json = False,
) -> None:
    """Approximate a function by a ReLU network with exponentially many linear pieces."""
    from asapc.relu.approx import approximate, parse_interval, save_onnx, save_plot
    from asapc.writing.folder import output_file, picture_file

    with ExitStack() as files:
        interval = parse_interval(domain)
        network_file = files.enter_context(output_file(out_file, force))
        plot_file = None if plot is None else files.enter_context(picture_file(plot, force))
        with err.status(f"fitting {runs} networks at each depth up to {depth}"):
            result = approximate(expression, depth, interval, points, runs, seed)
        save_onnx(result, network_file)
        if plot_file is not None:
            save_plot(result, plot_file, expression)
        if as_json:
            print_json(result.data())
            return
        title = f"{expression} on {domain}, {points} points, {runs} runs"
        show([showing.approximation(title, result.data()["rows"]), str(out_file), *([str(plot)] if plot else [])])


@command("asapc doctor", "asapc doctor --json", scratch=False)  # it tells why there are no temporary files
def doctor(as_json: Json = False) -> None:
    """Examine this machine and its installation, with a command for each thing that is wrong."""
    from asapc.doctor import examine
    from asapc.doctor.showing import examination

    with err.status("importing what asapc needs, to see whether it can"):
        found = examine()
    if as_json:
        print_json(found.data())
    else:
        show(examination(found))
    if not found.ready:
        raise typer.Exit(1)


def warn_of_unsafe_load(file: Path, options: CompileConfig) -> None:
    """Warn on stderr that the model's code is about to run, before it does."""
    if options.unsafe_load:
        say(err, f"warning: --unsafe-load runs code that stands in {file}", style="yellow")


def main() -> None:
    """Run the `asapc` command."""
    open_missing()
    with interrupts.handled():
        app()


if __name__ == "__main__":
    main()
