"""The `asapc` command: parse, call the library, show what it returns. No decisions are made here."""

import functools
import inspect as reflection
import json
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from asapc import showing
from asapc.config import OPTIONS, CompileConfig
from asapc.errors import AsapcError, InternalError, OptionError
from asapc.events import Event, StageAdvanced, StageDone, StageStarted
from asapc.process import interrupts
from asapc.process.scratch import temporary_files
from asapc.process.streams import Stream, open_missing
from asapc.types.options import Option
from asapc.version import __version__

app = typer.Typer(
    name="asapc",
    help="The compiler for doubly-stochastic attention: trained Sinkhorn models to ONNX and TensorRT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(file=cast(IO[str], Stream("stdout", required=True)), highlight=False)
err = Console(file=cast(IO[str], Stream("stderr", required=False)), highlight=False)

ENDS = "Exit codes: 0 done, 1 input at fault, 2 usage, {}70 defect, 130 or 143 interrupted."
BUDGET_MISSED = "3 fidelity budget missed, "
KEYWORD_ONLY = reflection.Parameter.KEYWORD_ONLY
READS = [OPTIONS[name] for name in ("model", "model_args", "weights", "inputs", "input_shape", "unsafe_load")]
CONFIG_FILE = Option("--config", "Options in TOML; the command line wins.", metavar="FILE", name="config", kind=Path)
TRUST_CONFIG = Option(
    "--trust-config", "Let the file of --config name code to run: --model, --unsafe-load.", name="trust", kind=bool
)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn exceptions into the exit codes of `asapc.errors`, with one message and one hint."""
    try:
        yield
        interrupts.check()
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as error:
        with interrupts.held():
            code = explain(error)
        raise typer.Exit(code) from None


def explain(error: BaseException) -> int:
    """Print on stderr what went wrong, and return the exit code for it."""
    # What an interruption turns into where it passes through code of others is no defect.
    if isinstance(error, KeyboardInterrupt) or interrupts.state.signal:
        say(err, interrupts.message())
        return interrupts.exit_code()
    if isinstance(error, AsapcError):
        say(err, f"error: {error}", style="red")
        say(err, f"hint: {error.hint}")
        return error.exit_code
    err.print_exception()
    say(err, "This is a defect in asapc. Please report it with the lines above and the command.")
    return InternalError.exit_code


def command(*examples: str, takes: Collection[Option] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to the app as the command of its name, which ends with the exit codes of `asapc.errors`.

    Args:
        examples: of the command line, for --help.
        takes: options of `CompileConfig`, to which --config is added. The function gets their values as one
            `CompileConfig`, its parameter `options`.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        ends = ENDS.format(BUDGET_MISSED if "fidelity" in {option.name for option in takes} else "")
        own = [p for p in reflection.signature(function).parameters.values() if p.name != "options"]
        parameters = [parameter(option) for option in (*takes, CONFIG_FILE, TRUST_CONFIG)] if takes else []

        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            with exit_codes(), temporary_files():
                if takes:
                    values = {option.name: arguments.pop(option.name) for option in takes}
                    arguments["options"] = options_of(arguments.pop("config"), arguments.pop("trust"), values)
                function(**arguments)

        # Typer reads parameters off the signature.
        parameters += [p.replace(kind=KEYWORD_ONLY) for p in own]
        cast(Any, run).__signature__ = reflection.Signature(parameters)
        app.command(epilog="\n\n".join(["Examples:", *examples, ends]))(run)
        return function

    return add


def parameter(option: Option) -> reflection.Parameter:
    """Return a declared option as typer takes it; it is None unless it stands on the command line."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in map(str, option.choices) if choice.startswith(incomplete)]

    default = f" [dim]{escape(f'[default: {option.shown_default}]')}[/dim]" if option.shown_default else ""
    entry = typer.Option(
        option.flag,
        help=escape(option.help) + default,
        metavar=option.metavar or None,
        show_default=False,
        rich_help_panel=option.group or None,
        autocompletion=complete if option.choices else None,
    )
    kind: Any = list[option.kind] if option.many else option.kind  # type: ignore[name-defined]
    return reflection.Parameter(option.name, KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, entry])


ModelFile = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="Checkpoint, weights (with --model), torch.export archive (.pt2) or ONNX."),
]
a_file = functools.partial(typer.Option, metavar="FILE")
a_number = functools.partial(typer.Option, metavar="NUMBER")
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]


def options_of(config: Path | None, trust: bool | None, values: dict[str, Any]) -> CompileConfig:
    """Read the options of a TOML file, overwritten by those on the command line: values that are not None or empty."""
    base = CompileConfig() if config is None else CompileConfig.from_toml(config, bool(trust))
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    changes: dict[str, Any] = {name: value for name, value in (values | lists).items() if value not in (None, ())}
    return replace(base, **changes)


@app.callback(invoke_without_command=True, epilog=ENDS.format(BUDGET_MISSED))
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
    if as_json:
        print_json(report.data)
    elif not quiet:
        show(showing.compilation(report.folder, dict(report.data)))


@command(
    "asapc inspect model.pt --why",
    "asapc inspect weights.pt --model my_models:build --input-shape x=2,197,64",
    takes=(OPTIONS["calib"], *READS),
)
def inspect(
    file: ModelFile,
    options: CompileConfig,
    why: Annotated[bool, typer.Option("--why", help="Show near misses, and why each was refused.")] = False,
    as_json: Json = False,
) -> None:
    """List the Sinkhorn attention of a checkpoint."""
    from asapc.commands.inspect import inspect_model, require_sites
    from asapc.writing.report import early_stop_data, miss_data, site_data

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
    "asapc verify model.asap --data samples.npz",
    "asapc verify model.asap --data samples.npz --fidelity 'relc<=0.05' --json",
    takes=(
        replace(OPTIONS["fidelity"], default_text="what the model was compiled to keep"),
        *(OPTIONS[name] for name in ("model", "model_args", "weights", "unsafe_load")),
    ),
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
    from asapc.writing.folder import output_file

    with ExitStack() as files:
        interval = parse_interval(domain)
        network_file = files.enter_context(output_file(out_file, force))
        plot_file = None if plot is None else files.enter_context(output_file(plot, force))
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


@command("asapc train digits --out mine.pt", "asapc train digits --epochs 1 --seed 3")
def train(
    recipe: Annotated[str, typer.Argument(metavar="digits", help="What to train.", show_default=False)],
    out_file: Annotated[Path, a_file("--out", help="Checkpoint to write.")] = Path("model.pt"),
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint if it exists.")] = False,
    seed: Annotated[int, a_number(help="Seed of weights and batches.")] = 0,
    epochs: Annotated[int, a_number(min=1, help="Passes over the training data.")] = 70,
) -> None:
    """Train a model with Sinkhorn attention, and its softmax twin for comparison."""
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

        def on_epoch(name: str, epoch: int, loss: float) -> None:
            progress.update(tasks[name], completed=epoch, description=f"{name}  loss {loss:.3f}")

        checkpoint = digits.train(seed, epochs, on_epoch)
        digits.save(checkpoint, partial)
    facts = checkpoint["training"]
    say(
        out,
        f"{out_file}: held-out accuracy {facts['held_out_accuracy']:.1%} on {digits.HELD_OUT} images, "
        f"softmax twin {facts['softmax_twin_accuracy']:.1%}",
    )


def warn_of_unsafe_load(file: Path, options: CompileConfig) -> None:
    """Warn on stderr that the model's code is about to run, before it does."""
    if options.unsafe_load:
        say(err, f"warning: --unsafe-load runs code that stands in {file}", style="yellow")


@contextmanager
def stages(visible: bool) -> Iterator[Callable[[Event], None]]:
    """Show events on stderr: a spinner for the running stage, a line with its time for each that is done."""
    status = err.status("")
    with redirect_stdout(sys.stderr), status if visible else nullcontext():  # what a model prints is no result

        def on_event(event: Event) -> None:
            interrupts.check()
            if not visible:
                return
            match event:
                case StageStarted(stage):
                    status.update(stage)
                case StageAdvanced(stage, detail):
                    status.update(f"{stage}  {detail}")
                case StageDone(stage, seconds, detail):
                    say(err, f"  {stage:<8} {seconds:6.1f} s  {detail}")

        yield on_event


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line: wrapped between words on a terminal, whole elsewhere, so that scripts can search it."""
    if console.is_terminal:  # rich would break words that are wider than the terminal
        text = textwrap.fill(text, console.width, break_long_words=False, break_on_hyphens=False)
    console.print(text, style=style, markup=False, soft_wrap=True)


def show(parts: Iterable[showing.Grid | str]) -> None:
    """Print tables and sentences on stdout."""
    for part in parts:
        if isinstance(part, str):
            say(out, part)
            continue
        table = Table(
            title=escape(part.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for column in part.columns:
            # Words give way to numbers where the terminal is narrow.
            words = column in part.words
            table.add_column(column, justify="left" if words else "right", no_wrap=not words, overflow="fold")
        for rows in part.groups:
            for row in rows:
                table.add_row(*map(escape, row), end_section=row is rows[-1])
        out.print(table)


def print_json(data: Mapping[str, Any]) -> None:
    """Print data alone on stdout, for programs."""
    out.file.write(json.dumps(data, indent=2) + "\n")
    out.file.flush()


def main() -> None:
    """Run the `asapc` command."""
    open_missing()
    with interrupts.handled():
        app()


if __name__ == "__main__":
    main()
