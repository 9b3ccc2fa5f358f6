"""The commands that measure: `bench` and `check`. As in `asapc.cli`, no decisions are made here."""

import csv
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from asapc import showing, showing_timing
from asapc.config import MAX_BATCH, OPTIONS, CompileConfig
from asapc.errors import AsapcError
from asapc.terminal import BUDGET_MISSED, LATENCY_ENDS, Json, command, print_json, show, stages

TEACHER = [OPTIONS[name] for name in ("model", "model_args", "weights", "unsafe_load", "seed")]
Batches = Annotated[
    list[int],
    typer.Option(
        "--batch", metavar="SIZE", min=1, max=MAX_BATCH, help="Batch size. Repeat to add.", show_default="as compiled"
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Samples, .npz, .npy or .pt.", show_default="those held out when it was compiled"
    ),
]
TeacherFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The model that was compiled.", show_default="where the report says it was"),
]
RuntimeName = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where ONNX Runtime runs it.")]
a_file = partial(typer.Option, metavar="FILE", show_default=False)
Markdown = Annotated[Path | None, a_file(help="Markdown to write, as for CI's summary. Replaced if it exists.")]


@command(
    "asapc bench digits.asap --against exact,softmax",
    "asapc bench main.asap pr.asap --batch 1 --batch 32 --csv latency.csv",
    takes=TEACHER,
)
def bench(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="What `asapc compile` wrote.")],
    options: CompileConfig,
    against: Annotated[
        str, typer.Option(metavar="RIVAL,...", help="Rivals to add: teacher, exact, truncated, softmax.")
    ] = "",
    batch: Batches = [],  # noqa: B006 typer copies it
    length: Annotated[
        list[int], typer.Option(metavar="SIZE", min=1, help="Length of open axes. Repeat to add.", show_default=False)
    ] = [],  # noqa: B006
    threads: Annotated[
        list[int], typer.Option(metavar="COUNT", min=1, help="Threads. Repeat to add.", show_default="one a core")
    ] = [],  # noqa: B006
    runtime: Annotated[
        list[str], typer.Option(metavar="cpu|cuda", help="Where to run. Repeat to add.", show_default="all there are")
    ] = [],  # noqa: B006
    seconds: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="The most for each table.")] = 10.0,
    data: Data = None,
    teacher: TeacherFile = None,
    as_json: Json = False,
    markdown: Markdown = None,
    csv_file: Annotated[Path | None, a_file("--csv", help="Table to write. Replaced if it exists.")] = None,
) -> None:
    """Measure compiled folders and rivals side by side."""
    from asapc.commands.bench import BenchOptions, bench_folders
    from asapc.commands.folders import runtime_of

    rivals = tuple(name.strip() for name in against.split(",") if name.strip())
    runtimes = tuple(map(runtime_of, runtime))
    asked = BenchOptions(rivals, tuple(batch), tuple(length), tuple(threads), runtimes, seconds, data, teacher)
    with outputs(markdown, csv_file) as (page, table):
        with stages(visible=True) as on_event:
            result = bench_folders(folders, asked, options, on_event)
        if page is not None:
            page.write_text(showing.markdown(showing_timing.bench(result)), encoding="utf-8")
        if table is not None:
            rows = list(showing_timing.bench_rows(result))
            with table.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    if as_json:
        print_json(result)
    else:
        show(showing_timing.bench(result))


@command(
    "asapc check digits.asap --baseline latency.json --max-slowdown 3%",
    "asapc check pr.asap --relative main.asap --junit check.xml",
    takes=(
        replace(OPTIONS["fidelity"], default_text="what the model was compiled to keep"),
        OPTIONS["threads"],
        *TEACHER,
    ),
    ends=BUDGET_MISSED + LATENCY_ENDS,
)
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `asapc compile` wrote.")],
    options: CompileConfig,
    baseline: Annotated[Path | None, a_file(help="Times of an earlier check to hold it to.")] = None,
    relative: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to hold it to, in turns on this machine.", show_default=False),
    ] = None,
    save_baseline: Annotated[
        Path | None, a_file(help="Write times for later checks, and hold latency to nothing. Replaced if it exists.")
    ] = None,
    max_slowdown: Annotated[
        str, typer.Option(metavar="SHARE", help="How much slower than the other it may be.")
    ] = "3%",
    batch: Batches = [],  # noqa: B006
    seconds: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="The most for each batch size.")] = 25.0,
    data: Data = None,
    teacher: TeacherFile = None,
    runtime: RuntimeName = "cpu",
    as_json: Json = False,
    junit: Annotated[Path | None, a_file(help="JUnit XML to write. Replaced if it exists.")] = None,
    markdown: Markdown = None,
    github_benchmark: Annotated[
        Path | None, a_file(help="Latencies to write for github-action-benchmark. Replaced if it exists.")
    ] = None,
) -> None:
    """Hold a compiled model to its fidelity budget, and its latency to an earlier one: a gate for CI."""
    from asapc.commands.check import check_folder
    from asapc.commands.folders import runtime_of
    from asapc.commands.gates import CheckOptions, parse_share
    from asapc.writing.ci import benchmark_entries, write_junit, write_junit_error

    share, where = parse_share(max_slowdown), runtime_of(runtime)
    asked = CheckOptions(baseline, relative, save_baseline, share, tuple(batch), seconds, data, teacher, where)
    found, failure = None, None
    with outputs(junit, markdown, github_benchmark) as (xml, page, entries):
        try:
            with stages(visible=not as_json) as on_event:
                result = check_folder(folder, asked, options, on_event)
            found, failure = result.data(), result.failure
        except AsapcError as error:  # what CI shows must say so, and not what an earlier check found
            failure = error
        parts = list(showing_timing.check(found)) if found else [f"NOT CHECKED: {folder}", str(failure)]
        if xml is not None:
            write_junit(xml, found) if found else write_junit_error(xml, str(folder), str(failure))
        if page is not None:
            page.write_text(showing.markdown(parts), encoding="utf-8")
        if entries is not None:
            entries.write_text(json.dumps(benchmark_entries(found) if found else [], indent=2) + "\n", encoding="utf-8")
    if found and as_json:
        print_json(found)
    elif found:
        show([*parts, *([str(save_baseline)] if save_baseline else [])])
    if failure is not None:
        raise failure


@contextmanager
def outputs(*paths: Path | None) -> Iterator[list[Path | None]]:
    """Yield a temporary file for each output that is asked for: what cannot be written is said before measuring.

    All get their names when the block ends well; see `output_file`.
    """
    from asapc.writing.folder import output_file

    with ExitStack() as files:
        yield [None if path is None else files.enter_context(output_file(path, force=True)) for path in paths]
