"""What the commands share: exit codes, options as typer takes them, progress, and how results are printed."""

import functools
import inspect as reflection
import json
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from asapc.config import CompileConfig
from asapc.errors import AsapcError, InternalError
from asapc.events import Event, StageAdvanced, StageDone, StageStarted, StageWaits
from asapc.process import interrupts
from asapc.process.scratch import temporary_files
from asapc.process.streams import Stream
from asapc.showing import Grid
from asapc.types.options import Option

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
LATENCY_ENDS = "4 slower, 5 not comparable, 6 latency not stable, "
printed: list[str] = []  # schemas of what the running command has printed as JSON: one result, or one error
a_number = functools.partial(typer.Option, metavar="NUMBER")
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
KEYWORD_ONLY = reflection.Parameter.KEYWORD_ONLY
CONFIG_FILE = Option("--config", "Options in TOML; the command line wins.", metavar="FILE", name="config", kind=Path)
TRUST_CONFIG = Option(
    "--trust-config", "Let the file of --config name code to run: --model, --unsafe-load.", name="trust", kind=bool
)


@contextmanager
def exit_codes(as_json: bool = False) -> Iterator[None]:
    """Turn exceptions into the exit codes of `asapc.errors`, with one message and one hint, in JSON too if asked."""
    printed.clear()
    try:
        yield
        interrupts.check()
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as error:
        with interrupts.held():
            code = explain(error)
            if as_json and not printed:
                hint = error.hint if isinstance(error, AsapcError) else None
                print_json({"schema": "asapc.error/1", "exit_code": code, "error": str(error), "hint": hint})
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


def command(
    *examples: str, takes: Collection[Option] = (), ends: str = "", scratch: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to the app as the command of its name, which ends with the exit codes of `asapc.errors`.

    Args:
        examples: of the command line, for --help.
        ends: exit codes that other commands do not have, as text.
        takes: options of `CompileConfig`, to which --config is added. The function gets their values as one
            `CompileConfig`, its parameter `options`.
        scratch: whether temporary files are kept in a folder that goes with it, without which it does not start.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        codes = ENDS.format(ends)
        own = [p for p in reflection.signature(function).parameters.values() if p.name != "options"]
        parameters = [parameter(option) for option in (*takes, CONFIG_FILE, TRUST_CONFIG)] if takes else []

        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            with exit_codes(arguments.get("as_json", False)), temporary_files() if scratch else nullcontext():
                if takes:
                    values = {option.name: arguments.pop(option.name) for option in takes}
                    arguments["options"] = options_of(arguments.pop("config"), arguments.pop("trust"), values)
                function(**arguments)

        # Typer reads parameters off the signature.
        parameters += [p.replace(kind=KEYWORD_ONLY) for p in own]
        cast(Any, run).__signature__ = reflection.Signature(parameters)
        app.command(epilog="\n\n".join(["Examples:", *examples, codes]))(run)
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


def options_of(config: Path | None, trust: bool | None, values: dict[str, Any]) -> CompileConfig:
    """Read the options of a TOML file, overwritten by those on the command line: values that are not None or empty."""
    base = CompileConfig() if config is None else CompileConfig.from_toml(config, bool(trust))
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    changes: dict[str, Any] = {name: value for name, value in (values | lists).items() if value not in (None, ())}
    return replace(base, **changes)


@contextmanager
def stages(visible: bool) -> Iterator[Callable[[Event], None]]:
    """Show events on stderr: the running stage with a clock, and a line with its time for each that is done.

    Elsewhere than on a terminal a line says that a stage began in place of the clock, so that a log that stops tells
    where.
    """
    clock = Clock()
    moving = visible and err.is_terminal
    live = err.status(clock) if moving else nullcontext()
    with redirect_stdout(sys.stderr), live:  # what a model prints is no result

        def on_event(event: Event) -> None:
            interrupts.check()
            if not visible:
                return
            match event:
                case StageStarted(stage):
                    clock.start(stage)
                    if not moving:
                        say(err, f"  {stage:<8} begins")
                case StageAdvanced(_, detail, remaining):
                    clock.detail, clock.end = detail, None if remaining is None else time.monotonic() + remaining
                case StageWaits(stage, detail):
                    clock.detail, clock.end = detail, None
                    if not moving:
                        say(err, f"  {stage:<8}           {detail} ...")
                case StageDone(stage, seconds, detail):
                    say(err, f"  {stage:<8} {seconds:6.1f} s  {detail}")

        yield on_event


class Clock:
    """The running stage with what it does now, how long it has taken, and how long it still takes if that is known."""

    def __init__(self) -> None:
        self.start("")

    def start(self, stage: str) -> None:
        """Begin a stage."""
        self.stage, self.detail, self.began, self.end = stage, "", time.monotonic(), None

    stage: str
    detail: str
    began: float
    end: float | None

    def __rich__(self) -> Text:
        """Return what is shown at this moment."""
        now = time.monotonic()
        left = "" if self.end is None or self.end < now else f", about {self.end - now:.0f} s left"
        return Text(
            f"{self.stage:<8} {now - self.began:6.1f} s  {self.detail}{left}", overflow="ellipsis", no_wrap=True
        )


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line: wrapped between words on a terminal, whole elsewhere, so that scripts can search it."""
    if console.is_terminal:  # rich would break words that are wider than the terminal
        text = textwrap.fill(text, console.width, break_long_words=False, break_on_hyphens=False)
    console.print(text, style=style, markup=False, soft_wrap=True)


def show(parts: Iterable[Grid | str]) -> None:
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
    printed.append(str(data.get("schema")))
    out.file.write(json.dumps(data, indent=2) + "\n")
    out.file.flush()
