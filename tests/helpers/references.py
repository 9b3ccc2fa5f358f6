"""What other readers make of a file that asapc has read: torch's strict load, safetensors, transformers, onnx."""

import argparse
import collections
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.export.pt2_archive._package import load_pt2

from asapc.config import CompileConfig
from asapc.errors import AsapcError
from asapc.loading.model import load_model
from asapc.loading.pt2.archive import silence
from asapc.models.vit import VisionTransformer
from asapc.types.model import LoadedModel

from .command import assert_user_error, run
from .damage import assert_in_one_line, members
from .formats import Format
from .hostile import Tiny
from .mutations import CANARY, Tree

COMPILED = "_orig_mod."
TOLD = ("weights found at", "removed from", "left over")  # in the notes of what is read in part
SHAPE = ("--input-shape", "x=2,3,4:float32")  # of what Tiny takes
NAMES = {
    (collections, "OrderedDict"),
    (argparse, "Namespace"),
    *((torch._utils, f"_rebuild_{kind}") for kind in ("tensor", "tensor_v2", "parameter")),
}
KNOWN = {(module.__name__, name): getattr(module, name) for module, name in NAMES}


class Idle:
    """Stands for all that a pickle names beside tensors and containers."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, *_: object) -> "Idle":
        return self

    __setstate__ = __setitem__ = append = extend = add = __call__


class Unpickler(pickle.Unpickler):
    """Reads protocols and objects at which torch's own reader for strangers' files gives up; imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        return KNOWN.get((module, name), Idle)


class Permissive:
    """What torch.load takes for the module `pickle`."""

    __name__ = "permissive"
    Unpickler = Unpickler
    UnpicklingError = pickle.UnpicklingError
    load = staticmethod(lambda file, **options: Unpickler(file, **options).load())


def check(format_: Format, tree: Tree) -> str:
    """Read mutated files, and assert what holds of all.

    Each is refused in one line, or its weights are those of a strict load; nothing in it runs.

    Returns:
        "refused", "read" where the strict load is of the whole file, "read in part" where asapc tells of which part.
    """
    with TemporaryDirectory() as folder, chdir(folder):
        write(tree)
        try:
            loaded = load_model(format_.file, CompileConfig(**format_.options))
        except AsapcError as error:
            assert_in_one_line(error)
            return "refused"
        finally:
            assert not CANARY.exists(), "code in the file ran"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return judge(Path(format_.file), loaded, format_.options)


def check_command(format_: Format, tree: Tree) -> str:
    """Read mutated files by `asapc inspect`; "refused" with exit code 1, one error and one hint, or "read" with 0."""
    with TemporaryDirectory() as folder, chdir(folder):
        write(tree)
        result = run(*format_.arguments, *SHAPE)
        assert not CANARY.exists(), "code in the file ran"
        if result.exit_code == 0:
            return "read"
        assert_user_error(result)
        return "refused"


def write(tree: Tree) -> None:
    for name, data in tree.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)


def judge(path: Path, loaded: LoadedModel, options: Mapping[str, Any]) -> str:
    """Assert that a model has the weights that other readers find in its file."""
    if path.suffix == ".onnx":
        stored = onnx_tensors(path)
        assert all(name in loaded.module.initializers.values() for name in stored)
        for buffer, name in loaded.module.initializers.items():
            assert bits(getattr(loaded.module, buffer)) == bits(torch.from_numpy(stored[name])), name
        return "read"
    if path.suffix == ".pt2":
        actual = {**loaded.program.state_dict, **tensors(loaded.program.constants)}
        assert {name: bits(value) for name, value in actual.items()} == program_bits(path)
        return "read"
    content = content_of(path)
    actual = tensors_of(loaded.module)
    model = new_model(path, content, options)
    if same(strict_load(model, content), actual):
        return "read"
    # A checkpoint of asapc train says itself which part of it the weights are.
    told = "format" in content or any(mark in note for mark in TOLD for note in loaded.notes)
    assert told, "it is read as if it were whole, and torch's strict load refuses it"
    for place, weights in [("", content), *nested(content)]:
        if options.get("weights") in (None, place):
            for part in parts(weights, model):
                if same(strict_load(model, part), actual):
                    return "read in part"
    raise AssertionError("it has weights that no strict load of a part gives")


def program_bits(path: Path) -> dict[str, tuple[Any, ...]]:
    """The bits of all tensors of a torch.export archive, by name."""
    try:
        with silence():
            program = load_pt2(path).exported_programs["model"]
        return {name: bits(value) for name, value in {**program.state_dict, **tensors(program.constants)}.items()}
    except Exception:  # of parts that asapc does without, such as sample inputs
        contents = {name.partition("/")[2]: data for name, data in members(path.read_bytes()).items()}
    of_tensors = {}
    for folder in ("weights", "constants"):
        payloads = json.loads(contents[f"data/{folder}/model_{folder}_config.json"])["config"]
        for name, payload in payloads.items():
            shape = tuple(size["as_int"] for size in payload["tensor_meta"]["sizes"])
            of_tensors[name] = torch.float32, shape, contents[f"data/{folder}/{payload['path_name']}"]
    return of_tensors


def onnx_tensors(path: Path) -> dict[str, Any]:
    """The initializers and tensors of Constant nodes, by name."""
    graph = onnx.load(path).graph
    constants = {node.output[0]: node.attribute[0] for node in graph.node if node.op_type == "Constant"}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    stored |= {name: attribute.t for name, attribute in constants.items() if attribute.name == "value"}
    return {name: onnx.numpy_helper.to_array(tensor).copy() for name, tensor in stored.items()}


def content_of(path: Path) -> Any:
    """What a file holds, or the files of a folder, as the libraries that write it read it."""
    if not path.is_dir():
        return read_weights(path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if (path / name).exists():
            return read_weights(path / name)
        if index.exists():
            places = json.loads(index.read_text())["weight_map"]
            return {key: read_weights(path / shard)[key] for key, shard in places.items()}
    raise AssertionError("it holds no weights")


def read_weights(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load(path.read_bytes())
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=Permissive())


def new_model(path: Path, content: Any, options: Mapping[str, Any]) -> nn.Module:
    """The model with other weights than the file's."""
    torch.manual_seed(99)
    if "model" in options:
        return Tiny()
    if not path.is_dir():
        return VisionTransformer(**content["model_args"])
    config = json.loads((path / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    return kind(kind.config_class.from_dict(config))


def nested(content: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The mappings inside a mapping, with the keys that lead to them."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Mapping):
            inner = f"{place}.{key}".strip(".")
            yield inner, value
            yield from nested(value, inner)


def parts(weights: Mapping[Any, Any], model: nn.Module) -> Iterator[dict[str, Any]]:
    """The entries of a mapping that a model knows, by each prefix that it may give to them all."""
    names = list(model.state_dict())
    by_name = {key.replace(COMPILED, ""): value for key, value in weights.items() if isinstance(key, str)}
    for prefix in {key.removesuffix(names[0]) for key in by_name if key.endswith(names[0])}:
        yield {name: by_name[prefix + name] for name in names if prefix + name in by_name}


def strict_load(model: nn.Module, weights: Any) -> dict[str, Tensor] | None:
    """All of a model's tensors after its own strict load, None where that refuses."""
    if not isinstance(weights, Mapping):
        return None
    state = dict(weights)
    for name, original in (getattr(model, "_tied_weights_keys", None) or {}).items():
        if original in state:
            state.setdefault(name, state[original])  # saved once; transformers' loader does the same
    unsaved = dict(model.named_buffers()).keys() - model.state_dict().keys()
    for name in unsaved & state.keys():
        if not same({name: state.pop(name)}, {name: model.get_buffer(name)}):
            return None
    try:
        model.load_state_dict(state, strict=True)
    except Exception:
        return None
    return {name: value.clone() for name, value in tensors_of(model).items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def bits(value: Tensor) -> tuple[Any, ...]:
    """Dtype, shape and bytes: zeros of either sign differ, and a NaN is equal to itself."""
    flat = value.detach().contiguous().reshape(-1)
    return value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()


def same(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    return one is not None and one.keys() == other.keys() and all(bits(one[key]) == bits(other[key]) for key in one)
