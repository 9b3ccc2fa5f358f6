"""Starts a real Triton server on a packaged model, sends the stored samples, and compares the answers.

The parts of it that go for any server serve `image_smoke` too.
"""

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np

from asapc.errors import BuildError, DependencyError, SamplesError
from asapc.loading.manifest import read_manifest
from asapc.serving.triton import batched, library
from asapc.types.interface import Interface

Arrays = Mapping[str, np.ndarray]
TOLERANCE = 1e-4  # of outputs, absolute and relative: another build of ONNX Runtime, another processor
START_SECONDS = 60
STOP_SECONDS = 10
NO_SERVER = (
    "no Triton server is installed",
    "put tritonserver on PATH, or name it or an environment with nvidia-pytriton by --server",
)


def check_smoke(folder: Path, server: Path | None = None) -> None:
    """Raise an error where a smoke test could not even begin.

    Args:
        folder: what `asapc compile` wrote.
        server: as of `smoke_triton`.

    Raises:
        SamplesError: the folder has no samples.
        DependencyError: there is no server, or no tritonclient.
    """
    stored_samples(folder)
    library("tritonclient.http"), library("tritonclient.grpc")
    with tempfile.TemporaryDirectory() as temporary:
        find_server(server, Path(temporary))


def smoke_triton(folder: Path, version: Path, server: Path | None = None) -> str:
    """Serve a version of a model, send the stored samples over HTTP and gRPC, and compare with the stored outputs.

    Args:
        folder: what `asapc compile` wrote, with samples; `check_smoke` looks for them.
        version: as `package_triton` returned it.
        server: `tritonserver`, or a virtual environment with nvidia-pytriton; None for what is installed.

    Returns:
        What was found, in one line.

    Raises:
        DependencyError: there is no server, or no tritonclient.
        BuildError: the server does not start, refuses the model or a request, or an output differs by more than
            `TOLERANCE`.
    """
    samples = stored_samples(folder)
    name, number = version.parent.name, version.name
    with running(version.parent.parent, name, server) as addresses:
        return compare_samples(folder, samples, addresses, name, number)


def stored_samples(folder: Path) -> tuple[Arrays, Arrays]:
    """Return the stored samples of a folder and the outputs stored for them, or raise SamplesError."""
    if not (folder / "samples.npz").exists():
        raise SamplesError(f"{folder} has no samples to send", "compile with --samples-in-folder 4")
    inputs, expected = ({**np.load(folder / name)} for name in ("samples.npz", "expected.npz"))
    return inputs, expected


def compare_samples(
    folder: Path, samples: tuple[Arrays, Arrays], addresses: Mapping[str, str], name: str, number: str = ""
) -> str:
    """Send the stored samples of a folder to a served model by each protocol, and compare; say what was found."""
    inputs, expected = samples
    # One by one, where a sample is a batch: there may be more of them than the server takes at once.
    alone = batched(Interface.of(read_manifest(folder)))
    count = len(next(iter(inputs.values())))
    largest = 0.0
    for protocol, address in addresses.items():
        for part in [slice(i, i + 1) for i in range(count)] if alone else [slice(None)]:
            sent = {key: array[part] for key, array in inputs.items()}
            outputs = infer(protocol, address, name, sent, list(expected), number)
            for output, value in expected.items():
                largest = max(largest, compare(f"{output} over {protocol}", outputs[output], value[part]))
    return f"smoke test: {count} samples over HTTP and gRPC, outputs within {largest:.1g} of the stored ones"


def compare(name: str, output: np.ndarray, stored: np.ndarray) -> float:
    """Return the largest difference of an output; raise BuildError if it is more than `TOLERANCE`."""
    difference = float(np.abs(output.astype(float) - stored).max(initial=0))
    if not np.allclose(output, stored, TOLERANCE, TOLERANCE):
        raise BuildError(
            f"{name} differs by {difference:.1g} from the stored outputs",
            "compile the model again; if it stays, please report it",
        )
    return difference


def infer(
    protocol: str, address: str, model: str, inputs: Mapping[str, np.ndarray], outputs: list[str], version: str = ""
) -> dict[str, np.ndarray]:
    """Send one request with tritonclient, and return the outputs by name.

    Args:
        protocol: "http" or "grpc".
        address: host and port.
        model: its name.
        inputs: by name.
        outputs: their names.
        version: of the model, "" for the one that the server chooses.

    Raises:
        BuildError: the server refuses it, or cannot be reached.
    """
    client = library(f"tritonclient.{protocol}")
    triton = library("tritonclient.utils")
    values = []
    for name, array in inputs.items():
        values.append(client.InferInput(name, list(array.shape), triton.np_to_triton_dtype(array.dtype)))
        values[-1].set_data_from_numpy(np.ascontiguousarray(array))
    try:
        with client.InferenceServerClient(address) as connection:
            asked = [client.InferRequestedOutput(name) for name in outputs]
            result = connection.infer(model, values, version, asked)
            return {name: result.as_numpy(name) for name in outputs}
    except (triton.InferenceServerException, OSError) as error:
        raise BuildError(f"the server refuses a request over {protocol}: {error}", "see the server's log") from error


@contextmanager
def running(repository: Path, model: str, server: Path | None = None, *options: str) -> Iterator[dict[str, str]]:
    """Serve a model on ports of this machine alone; yield host and port by protocol once it is ready.

    Args:
        repository: of models.
        model: the name of one.
        server: as of `smoke_triton`.
        options: of the server; without any it loads that model alone.

    Raises:
        DependencyError: there is no server.
        BuildError: it ends before the model is ready, or takes longer than `START_SECONDS`.
    """
    control = ("--model-control-mode=explicit", f"--load-model={model}")
    with tempfile.TemporaryDirectory() as temporary:
        program, environment = find_server(server, Path(temporary))
        http, grpc = free_ports(2)
        served = Path(temporary) / "repository"
        served.symlink_to(repository.resolve())  # the Python backend splits its command at spaces in a path
        command = [
            *program,
            f"--model-repository={served}",
            *("--http-address=127.0.0.1", f"--http-port={http}"),
            *("--grpc-address=127.0.0.1", f"--grpc-port={grpc}", "--allow-metrics=false"),
            *(options or control),
        ]
        addresses = {"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"}
        hint = "start it on the repository by hand with --log-verbose=1"
        with started(command, environment, addresses["http"], model, hint):
            yield addresses


@contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str], address: str, model: str, hint: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the end of the block; yield its process once a model is ready.

    Raises:
        BuildError: it ends before, or takes longer than `START_SECONDS`; with the hint.
    """
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},  # what is served stays as it was written
                cwd=temporary,  # Python's own path begins there
            )
        try:
            wait(process, address, model, log, hint)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait(process: subprocess.Popen[bytes], address: str, model: str, log: Path, hint: str) -> None:
    """Return when a model is ready; raise BuildError where it does not become so."""
    triton = library("tritonclient.utils")
    client = library("tritonclient.http").InferenceServerClient(address)
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit and process.poll() is None:
        try:
            if client.is_model_ready(model):
                client.close()
                return
        except (triton.InferenceServerException, OSError):
            pass  # it does not listen yet
        time.sleep(0.1)
    said = last_error(log)
    state = f"is not ready after {START_SECONDS} s" if process.poll() is None else "ended"
    backend = "choose a --backend that it has; one from nvidia-pytriton has python alone"
    raise BuildError(
        f"the server {state} and does not serve {model}: {said}",
        backend if "unable to find backend" in said else hint,
    )


def last_error(log: Path) -> str:
    """Return what a server said last of an error."""
    lines = log.read_text(errors="replace").split("\n")
    errors = [line for line in lines if re.search("fail|error|unavailable", line, re.IGNORECASE)]
    return (errors or [line for line in lines if line] or ["it says nothing"])[-1][:400]


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def find_server(server: Path | None, temporary: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command of a server and its environment: as given, on PATH, or in a wheel of nvidia-pytriton.

    Raises:
        DependencyError: there is none.
    """
    program = shutil.which("tritonserver") if server is None else str(server) if server.is_file() else None
    if program is not None:
        return [str(Path(program).resolve())], dict(os.environ)
    sites = [wheel_here()] if server is None else sorted(server.resolve().glob("lib/python3*/site-packages"))
    for site in sites:
        if site is not None and (site / "pytriton" / "tritonserver" / "bin" / "tritonserver").is_file():
            return unpacked(site, temporary)
    raise DependencyError(*NO_SERVER if server is None else (f"{server} holds no Triton server", NO_SERVER[1]))


def wheel_here() -> Path | None:
    """Return where nvidia-pytriton is installed in this environment."""
    try:
        return Path(str(metadata.distribution("nvidia-pytriton").locate_file("")))
    except metadata.PackageNotFoundError:
        return None


def unpacked(site: Path, temporary: Path) -> tuple[list[str], dict[str, str]]:
    """Return the server of a wheel, with the stub of its Python in its place in a copy of the backends."""
    server = site / "pytriton" / "tritonserver"
    backends = temporary / "backends"
    shutil.copytree(server / "backends", backends)
    stub = "triton_python_backend_stub"
    version = site.parent.name.removeprefix("python")
    source = server / "python_backend_stubs" / version / stub
    if not source.is_file():
        raise DependencyError(f"nvidia-pytriton has no backend for Python {version}", "use another Python")
    shutil.copy(source, backends / "python" / stub)
    programs = site.parents[2] / "bin"
    base = (programs / "python").resolve().parents[1]
    libraries = os.pathsep.join([str(site / "nvidia_pytriton.libs"), str(base / "lib")])
    command = [str(server / "bin" / "tritonserver"), f"--backend-directory={backends}"]
    # The Python inside the stub takes the packages beside the program that PATH names.
    path = os.pathsep.join([str(programs), os.environ.get("PATH", "")])
    return command, {**os.environ, "PATH": path, "LD_LIBRARY_PATH": libraries}
