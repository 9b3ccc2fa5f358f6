"""`asapc package`: a compiled folder as what a server takes; one target a call."""

from pathlib import Path

from asapc.errors import AsapcError, OptionError
from asapc.serving.image import package_image
from asapc.serving.image_smoke import check_image_smoke, smoke_image
from asapc.serving.smoke import check_smoke, smoke_triton
from asapc.serving.triton import package_triton


def package(
    folder: Path,
    triton: Path | None = None,
    name: str | None = None,
    version: int | None = None,
    backend: str | None = None,
    force: bool = False,
    smoke: bool = False,
    server: Path | None = None,
    image: Path | None = None,
) -> list[str]:
    """Package a compiled folder for a server.

    Args:
        folder: what `asapc compile` wrote.
        triton: a model repository of Triton Inference Server.
        name: of the model; None for the folder's.
        version: as of `package_triton`.
        backend: as of `package_triton`; None for onnxruntime.
        force: as of `package_triton` and `package_image`.
        smoke: whether to try what was written with the stored samples.
        server: as of `smoke_triton` and `smoke_image`.
        image: the folder of a container image to write.

    Returns:
        What was written and tried, in sentences.

    Raises:
        OptionError: not one target is given, or an option of another.
        AsapcError: as of the functions named above.
    """
    if server is not None and not smoke:
        raise OptionError("--server is for --smoke", "add --smoke, or omit it")
    if triton is None and image is None:
        raise OptionError("there is nothing to package for", "give --triton REPOSITORY or --image OUT")
    if triton is not None and image is not None:
        raise OptionError("--triton and --image are two targets", "package for each by a command of its own")
    if image is not None and (version is not None or backend is not None):
        raise OptionError("--model-version and --backend are for --triton", "omit them")
    name = folder.absolute().name.removesuffix(".asap") if name is None else name
    if smoke:
        check_smoke(folder, server) if image is None else check_image_smoke(folder, image, server)
    if triton is not None:
        backend = backend or "onnxruntime"
        path = package_triton(folder, triton, name, backend, version, force)
        notes = [f"{path}: for Triton's backend {backend}"]
    if image is not None:
        package_image(folder, path := image, name, force)
        notes = [f"{image}: a container image of KServe's server; see {image / 'README.md'}"]
    if smoke:
        try:
            notes.append(
                smoke_triton(folder, path, server) if image is None else smoke_image(folder, path, name, server)
            )
        except AsapcError as error:
            raise type(error)(f"{path} was written, and failed its smoke test: {error}", error.hint) from error
    return notes
