"""Writes what `asapc compile` wrote into a model repository of Triton Inference Server."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import asapc
from asapc.errors import CheckpointError, DependencyError, OptionError, OutputError
from asapc.loading.manifest import MANIFEST, read_checked, read_manifest
from asapc.process.interrupts import held
from asapc.process.scratch import alone
from asapc.runtime.triton import MODEL
from asapc.types.interface import Interface, TensorInfo
from asapc.writing.folder import OLD, check_free, listed_files, temporary_folder, unwritable

BACKENDS = ("onnxruntime", "tensorrt", "python")
CONFIG, WARMUP = "config.pbtxt", "warmup"
# Samples in one batch where the model has no limit.
MAX_BATCH = 64
# Which versions a server keeps: the newest, which answers, and the one before, to go back to.
VERSIONS = 2
# Triton reads numbers of versions as int64.
MAX_VERSION = 2**63 - 1
# How long a request waits for others to share its batch.
QUEUE_MICROSECONDS = 100
# What `asapc.load` consists of: it goes into images and into each version of the Python backend, which need no asapc.
RUNTIME = (
    *("__init__.py", "config.py", "errors.py", "hashes.py", "version.py"),
    *("runtime/*.py", "types/*.py", "loading/__init__.py", "loading/manifest.py", "loading/schemas.py"),
    *("loading/*.schema.json", "loading/untrusted/*.py", "backends/__init__.py", "backends/onnxruntime/__init__.py"),
    "backends/onnxruntime/library.py",
    *(f"backends/tensorrt/{name}.py" for name in ("__init__", "cuda", "engine", "loader", "ports", "runner")),
)
NUMPY_TO_TRITON = {
    "bool": "TYPE_BOOL",
    **{f"{kind}{bits}": f"TYPE_{kind.upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"TYPE_FP{bits}" for bits in (16, 32, 64)},
}


def package_triton(
    folder: Path, repository: Path, name: str, backend: str, version: int | None = None, force: bool = False
) -> Path:
    """Add a compiled folder to a model repository; a server that polls it never sees half a version.

    Args:
        folder: what `asapc compile` wrote.
        repository: made where it does not exist.
        name: of the model in the repository.
        backend: one of `BACKENDS`.
        version: a whole number of at least 1; None for the one after the latest.
        force: whether to replace the version if it exists.

    Returns:
        The folder of the version.

    Raises:
        OptionError: a name or backend that Triton does not take, or no engine that its backend reads.
        CheckpointError: the compiled folder is not whole.
        DependencyError: tritonclient is missing.
        OutputError: the version exists and `force` is not given, the model's other versions have another interface, or
            the repository cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise OptionError(f"a model cannot be called {name!r}", "give --name of letters, digits and . _ -")
    if backend not in BACKENDS:
        raise OptionError(f"there is no backend {backend!r}", f"give one of {', '.join(BACKENDS)}")
    manifest = read_manifest(folder)
    model = repository / name
    number = version if version is not None else 1 + max(versions(model), default=0)
    if not 1 <= number <= MAX_VERSION:
        raise OptionError(f"a version cannot be {number}", f"give --model-version 1 to {MAX_VERSION}")
    config = model_config(folder, manifest, name, backend, number)
    try:
        if os.path.lexists(model) and not model.is_dir():
            raise OutputError(f"{model} is no folder", "give another --name")
        if model.is_dir() or not movable(repository):
            return add_version(folder, model, config, backend, number, force)
        with temporary_folder(repository, True, check_folder) as temporary:
            partial = temporary / name
            write_version(folder, partial / str(number), backend)
            write_warmup(folder, partial, config)
            (partial / CONFIG).write_text(as_text(config))
            repository.mkdir(exist_ok=True)
            check_free(model, force=False)  # another run may have finished meanwhile
            with held():
                partial.rename(model)
    except OSError as error:
        raise unwritable(model, error) from None
    return model / str(number)


def add_version(folder: Path, model: Path, config: Any, backend: str, number: int, force: bool) -> Path:
    """Put a version beside the others of a model, or in the place of an earlier one."""
    path = model / str(number)
    # Here and not beside the repository: of a model's folders a server reads those alone that are named by a number.
    with temporary_folder(path, force, check_version) as temporary:
        write_version(folder, temporary / "new", backend)
        with alone(model):  # or another run's entry in the configuration would be lost
            merge(model / CONFIG, config, versions(model) - {number})
            write_warmup(folder, temporary, config)
            (temporary / CONFIG).write_text(as_text(config))
            check_free(path, force)
            publish(temporary, path)
    return path


def publish(temporary: Path, path: Path) -> None:
    """Move the new version, its warm-up and its configuration into the folder of a model, undisturbed by signals."""
    model, warmup = path.parent, path.parent / WARMUP
    with held():
        if path.exists():
            (temporary / OLD).mkdir()
            path.rename(temporary / OLD / path.name)
        warmup.mkdir(exist_ok=True)
        earlier = {file.name for file in warmup.iterdir()}
        for file in (temporary / WARMUP).glob("*"):
            file.replace(warmup / file.name)
            earlier.discard(file.name)
        (temporary / CONFIG).replace(model / CONFIG)
        (temporary / "new").rename(path)
        for name in earlier:  # no configuration asks for them any more
            (warmup / name).unlink()


def merge(path: Path, config: Any, others: set[int]) -> None:
    """Take over what a model's configuration says of other versions, which share it.

    Raises:
        OutputError: their interface or backend is another, or the file is not one of Triton's.
    """
    if not others:
        return
    earlier = parse(path)
    parameters = {key: value.string_value for key, value in earlier.parameters.items()}
    for one in (earlier, copy := type(config).FromString(config.SerializeToString())):
        one.ClearField("parameters")
        one.ClearField("model_warmup")
    if earlier != copy:
        raise OutputError(
            f"{path.parent} has versions with another backend, other inputs or other outputs",
            "give another --name: all versions of a model share one configuration",
        )
    for key, value in parameters.items():
        if key not in config.parameters:
            config.parameters[key].string_value = value


def versions(model: Path) -> set[int]:
    """Return the numbers of a model's versions."""
    if not model.is_dir():
        return set()
    return {int(path.name) for path in model.iterdir() if re.fullmatch("[1-9][0-9]*", path.name)}


def check_folder(path: Path) -> None:
    """Raise OutputError if a repository is no folder."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is no folder", "give --triton a folder")


def movable(repository: Path) -> bool:
    """Return whether what grows beside a repository can be moved into it, which file systems of their own rule out."""
    parent = repository.absolute().parent
    if not repository.is_dir():
        return True
    return repository.stat().st_dev == parent.stat().st_dev and os.access(parent, os.W_OK)


def check_version(path: Path) -> None:
    """Raise OutputError if a version exists that asapc did not write."""
    if path.exists() and listed_files(path / MANIFEST) is None and listed_files(path / MODEL / MANIFEST) is None:
        raise OutputError(f"{path} was not written by asapc, and is not replaced", "give another --model-version")


def write_version(folder: Path, target: Path, backend: str) -> None:
    """Write the folder of a version."""
    target.mkdir(parents=True)
    if backend == "python":
        (target / MODEL).mkdir()
        for file in folder.iterdir():  # regular files alone; shutil.copytree would hide why one cannot be written
            shutil.copyfile(file, target / MODEL / file.name)
        (target / "model.py").write_text("from asapc.runtime.triton import TritonPythonModel as TritonPythonModel\n")
        write_runtime(target)
        return
    artifact, name = ("model.engine", "model.plan") if backend == "tensorrt" else ("model.onnx", "model.onnx")
    shutil.copyfile(folder / artifact, target / name)
    for data in folder.glob("*.onnx.data") if backend == "onnxruntime" else ():
        shutil.copyfile(data, target / data.name)
    shutil.copyfile(folder / MANIFEST, target / MANIFEST)


def write_runtime(target: Path) -> None:
    """Write what `asapc.load` consists of into a folder, from which it is then imported."""
    package = Path(asapc.__file__).parent
    for source in (path for pattern in RUNTIME for path in package.glob(pattern)):
        copy = target / "asapc" / source.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)


def write_warmup(folder: Path, model: Path, config: Any) -> None:
    """Write the first stored sample as the server reads it for the warm-up of a configuration."""
    sample = first_sample(folder)
    for warmup in config.model_warmup:
        (model / WARMUP).mkdir(exist_ok=True)
        for name, entry in warmup.inputs.items():
            (model / WARMUP / entry.input_data_file).write_bytes(sample[name].tobytes())


def first_sample(folder: Path) -> Mapping[str, np.ndarray]:
    """Return the first stored sample by its inputs' names, with its axis of the batch; empty without samples."""
    path = folder / "samples.npz"
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as samples:
        return {name: samples[name][:1] for name in samples.files}


def batched(interface: Interface) -> bool:
    """Whether the first axis of all inputs and outputs is one open axis, of which one sample is enough."""
    first = {info.shape[0] if info.shape else 0 for info in (*interface.inputs, *interface.outputs)}
    size = next(iter(first))
    return len(first) == 1 and not isinstance(size, int) and interface.range_of(size).low <= 1


def model_config(folder: Path, manifest: Mapping[str, Any], name: str, backend: str, number: int) -> Any:
    """Return the configuration of a model, a message of Triton's own schema."""
    schema = library("model_config_pb2")
    interface = Interface.of(manifest)
    config = schema.ModelConfig(name=name, backend=backend)
    config.version_policy.latest.num_versions = VERSIONS
    open_batch = batched(interface)
    if open_batch:
        config.max_batch_size = interface.range_of(interface.inputs[0].shape[0]).high or MAX_BATCH
        config.dynamic_batching.max_queue_delay_microseconds = QUEUE_MICROSECONDS
    for infos, entries in ((interface.inputs, config.input), (interface.outputs, config.output)):
        for info in infos:
            entry = entries.add(name=info.name, data_type=data_type(schema, info))
            sizes = info.shape[1:] if open_batch else info.shape
            entry.dims.extend([size if isinstance(size, int) else -1 for size in sizes] or [1])
            if not sizes:  # Triton has no tensors without an axis
                entry.reshape.SetInParent()
    # The Python backend hands arrays over in the computer's memory; asapc.load takes a GPU itself if there is one.
    kind = {"python": "KIND_CPU", "tensorrt": "KIND_GPU", "onnxruntime": "KIND_AUTO"}[backend]
    config.instance_group.add(count=1, kind=schema.ModelInstanceGroup.Kind.Value(kind))
    if backend == "tensorrt":
        check_engine(folder)
        # A graph is for fixed shapes; of open lengths there are too many.
        config.optimization.cuda.graphs = all(isinstance(size, int) for i in interface.inputs for size in i.shape[1:])
    add_warmup(schema, config, first_sample(folder), interface, open_batch, number)
    config.parameters["asapc"].string_value = manifest["asapc"]
    config.parameters[f"model_sha256_of_version_{number}"].string_value = manifest["model_sha256"]
    return config


def add_warmup(
    schema: Any, config: Any, sample: Mapping[str, np.ndarray], interface: Interface, open_batch: bool, number: int
) -> None:
    """Let the server compute a stored sample before it says that a version is ready."""
    if not sample or not open_batch:  # one sample is no batch of another size
        return
    warmup = config.model_warmup.add(name="sample", batch_size=1)
    for position, info in enumerate(interface.inputs):
        entry = warmup.inputs[info.name]
        entry.data_type = data_type(schema, info)
        entry.dims.extend(sample[info.name].shape[1:] or (1,))
        entry.input_data_file = f"{number}.{position}"  # names of inputs may be none of files


def check_engine(folder: Path) -> None:
    """Raise OptionError unless a folder has an engine that Triton's TensorRT backend reads."""
    artifacts: Sequence[Mapping[str, Any]] = read_checked(folder / "report.json")["artifacts"]
    builder = next((artifact["builder"] for artifact in artifacts if artifact["kind"] == "engine"), None)
    if builder is None:
        raise OptionError(f"{folder} has no engine", "compile it with TensorRT, or give another --backend")
    if "rtx" in builder.lower():
        raise OptionError(
            f"the engine in {folder} is of {builder}, which Triton does not run",
            "compile it where TensorRT proper is installed, or give another --backend",
        )


def data_type(schema: Any, info: TensorInfo) -> int:
    """Return Triton's number for the dtype of an input or output."""
    if info.dtype not in NUMPY_TO_TRITON:
        raise CheckpointError(f"Triton has no tensors of {info.dtype}, as {info.name} is", "compile another model")
    return int(schema.DataType.Value(NUMPY_TO_TRITON[info.dtype]))


def library(module: str) -> Any:
    """Return a module of tritonclient.

    Raises:
        DependencyError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(f"tritonclient.grpc.{module}" if module.endswith("pb2") else module)
    except ImportError:
        raise DependencyError("tritonclient is not installed", 'pip install "asapc[serving]"') from None


def as_text(config: Any) -> str:
    """Return a configuration as Triton's text files have it."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def parse(path: Path) -> Any:
    """Read a configuration.

    Raises:
        OutputError: the file is not one of Triton's.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(path.read_text(), library("model_config_pb2").ModelConfig())
    except (OSError, ValueError, text_format.ParseError):
        raise OutputError(f"{path} is no configuration of Triton", "give another --name, or mend it") from None
