"""Starts the server of an image's folder without a container, sends the stored samples, and compares the answers."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asapc.errors import DependencyError
from asapc.serving.image import SERVE
from asapc.serving.smoke import compare_samples, free_ports, started, stored_samples
from asapc.serving.triton import library

REQUIREMENTS = "requirements.txt"


def check_image_smoke(folder: Path, image: Path, server: Path | None = None) -> None:
    """Raise an error where `smoke_image` could not even begin: without samples, server or tritonclient."""
    stored_samples(folder)
    library("tritonclient.http"), library("tritonclient.grpc")
    find_python(image, server)


def smoke_image(folder: Path, image: Path, name: str, server: Path | None = None) -> str:
    """Serve what `package_image` wrote, send the stored samples over HTTP and gRPC, and compare as `smoke_triton` does.

    Args:
        folder: what `asapc compile` wrote, with samples.
        image: what `package_image` wrote.
        name: of the model.
        server: a virtual environment with the requirements of the image; None for that of this process.

    Returns:
        What was found, in one line.

    Raises:
        DependencyError: the server is not installed there, or no tritonclient here.
        AsapcError: as of `smoke_triton`.
    """
    samples = stored_samples(folder)
    with running_image(image, name, server) as (addresses, _):
        return compare_samples(folder, samples, addresses, name)


@contextmanager
def running_image(
    image: Path, name: str, server: Path | None = None
) -> Iterator[tuple[dict[str, str], subprocess.Popen[bytes]]]:
    """Serve the folder of an image on free ports; yield host and port by protocol, and the process, once it is ready.

    KServe's server listens on all interfaces of the machine.

    Args:
        image: what `package_image` wrote.
        name: of the model.
        server: as of `smoke_image`.

    Raises:
        DependencyError: the server is not installed there.
        BuildError: it ends before the model is ready, or takes longer than `smoke.START_SECONDS`.
    """
    python = find_python(image, server)
    http, grpc = free_ports(2)
    addresses = {"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"}
    command = [str(python), str(image.resolve() / SERVE), f"--http_port={http}", f"--grpc_port={grpc}"]
    with started(command, os.environ, addresses["http"], name, f"try it: {python} {image / SERVE}") as process:
        yield addresses, process


def find_python(image: Path, server: Path | None) -> Path:
    """Return the Python of an environment in which KServe is installed, or raise DependencyError."""
    python = Path(sys.executable) if server is None else server.absolute() / "bin" / "python"
    # Asked rather than looked for: packages may stand in several places.
    command = [str(python), "-c", "import importlib.util as u; raise SystemExit(u.find_spec('kserve') is None)"]
    if not python.exists() or subprocess.run(command, check=False, capture_output=True).returncode:
        raise DependencyError(
            f"{server or 'this Python'} holds no KServe server",
            f"name by --server a virtual environment with pip install --require-hashes -r {image / REQUIREMENTS}",
        )
    return python
