"""The commands that use what was compiled: `run` and `package`. As in `asapc.cli`, no decisions are made here."""

from pathlib import Path
from typing import Annotated

import typer

from asapc.terminal import a_number, command, out, say, show


@command(
    "asapc run model.asap --inputs samples.npz --out outputs.npz",
    "asapc run model.asap --inputs samples.npz --device cpu --force",
)
def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `asapc compile` wrote.")],
    inputs: Annotated[
        Path, typer.Option(metavar="FILE", help="Inputs by name, .npz, or .npy for a model of one.", show_default=False)
    ],
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE", help="Outputs, .npz.")] = Path("outputs.npz"),
    device: Annotated[str, typer.Option(metavar="auto|tensorrt|cuda|cpu", help="Where to run it.")] = "auto",
    threads: Annotated[int, a_number(help="Threads on the CPU, 0 for one a core.", min=0)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the outputs if they exist.")] = False,
) -> None:
    """Run a compiled model on the arrays of a file, without PyTorch."""
    from asapc.runtime.files import run_files
    from asapc.writing.folder import output_file

    with output_file(out_file, force) as partial:
        note = run_files(folder, inputs, partial, device, threads)
    say(out, f"{out_file}: {note}")


@command(
    "asapc package model.asap --triton repository",
    "asapc package model.asap --image image --smoke",
)
def package(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `asapc compile` wrote.")],
    triton: Annotated[Path | None, typer.Option(metavar="REPOSITORY", help="Model repository of Triton.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="OUT", help="Folder of a container image.")] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the served model.", show_default="the folder's")
    ] = None,
    model_version: Annotated[int | None, a_number(help="Of the model.", min=1, show_default="the next")] = None,
    backend: Annotated[
        str | None,
        typer.Option(metavar="onnxruntime|tensorrt|python", help="Of Triton.", show_default="onnxruntime"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the version or folder if it exists.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Serve it and compare answers to the stored samples.")] = False,
    server: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="For --smoke: tritonserver, or a virtual environment with the server.",
            show_default="what is installed",
        ),
    ] = None,
) -> None:
    """Package a compiled model for an inference server."""
    from asapc.commands.package import package as package_folder

    show(package_folder(folder, triton, name, model_version, backend, force, smoke, server, image))
