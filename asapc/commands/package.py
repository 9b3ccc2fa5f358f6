"""`asapc package`: a compiled folder as what a server takes; one target a call."""

from pathlib import Path

from asapc.errors import AsapcError, OptionError
from asapc.serving.smoke import check_smoke, smoke_triton
from asapc.serving.triton import package_triton


def package(
    folder: Path,
    triton: Path | None,
    name: str | None = None,
    version: int | None = None,
    backend: str = "onnxruntime",
    force: bool = False,
    smoke: bool = False,
    server: Path | None = None,
) -> list[str]:
    """Package a compiled folder for a server.

    Args:
        folder: what `asapc compile` wrote.
        triton: a model repository of Triton Inference Server.
        name: of the model; None for the folder's.
        version: as of `package_triton`.
        backend: as of `package_triton`.
        force: as of `package_triton`.
        smoke: whether to try what was written with the stored samples.
        server: as of `smoke_triton`.

    Returns:
        What was written and tried, in sentences.

    Raises:
        OptionError: no target is given.
        AsapcError: as of `package_triton`, `check_smoke` and `smoke_triton`.
    """
    if triton is None:
        raise OptionError("there is nothing to package for", "give --triton REPOSITORY")
    if server is not None and not smoke:
        raise OptionError("--server is for --smoke", "add --smoke, or omit it")
    name = folder.absolute().name.removesuffix(".asap") if name is None else name
    if smoke:
        check_smoke(folder, server)
    path = package_triton(folder, triton, name, backend, version, force)
    notes = [f"{path}: for Triton's backend {backend}"]
    if smoke:
        try:
            notes.append(smoke_triton(folder, path, server))
        except AsapcError as error:
            raise type(error)(f"{path} was written, and failed its smoke test: {error}", error.hint) from error
    return notes
