"""Plain weights with `--model`: found by structure, compared, and given to the model that the user names."""

import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.hostile import Tiny, assert_refused
from helpers.weights import TINY, same, saved, weights
from safetensors.torch import save_file
from torch import nn

from asapc.config import CompileConfig
from asapc.errors import CheckpointError, OptionError
from asapc.loading.model import load_model


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

    def forward(self, x):
        return self.out(x)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_is_given_to_the_model(suffix, legacy, tmp_path):
    expected = weights()
    torch.save(expected, tmp_path / f"w{suffix}", _use_new_zipfile_serialization=not legacy)
    loaded = load_model(tmp_path / f"w{suffix}", TINY)
    assert same(loaded, expected)
    assert not loaded.module.training
    assert loaded.notes == ()


def test_safetensors_are_given_to_the_model(tmp_path):
    expected = weights()
    save_file(expected, tmp_path / "w.safetensors")
    assert same(load_model(tmp_path / "w.safetensors", TINY), expected)


def nest(*keys: str):
    def make(weights: dict) -> dict:
        for key in reversed(keys):
            weights = {"epoch": 3, key: weights, "note": "text"}
        return weights

    return make


def prefixed(prefix: str):
    return lambda weights: {prefix + name: value for name, value in weights.items()}


WRAPPED = {
    "model": (nest("model"), ["'model'"]),
    "state_dict": (nest("state_dict"), ["'state_dict'"]),
    "deep": (nest("run", "net", "weights"), ["'run.net.weights'"]),
    "data parallel": (prefixed("module."), ["'module.'"]),
    "compiled": (prefixed("_orig_mod."), ["'_orig_mod.'"]),
    "compiled in part": (lambda w: {k.replace("layers.", "layers._orig_mod."): v for k, v in w.items()}, ["_orig_mod"]),
    "both": (prefixed("module._orig_mod."), ["'_orig_mod.'", "'module.'"]),
    "trainer": (prefixed("trainer.model.module."), ["'trainer.model.module.'"]),
    "averaged": (
        lambda w: {"n_averaged": torch.tensor(3), **prefixed("module.")(w)},
        ["'module.'", "left over: n_averaged"],
    ),
    "nested and prefixed": (lambda w: {"ema": prefixed("module.")(w)}, ["'ema'", "'module.'"]),
    "with optimizer": (
        lambda w: {"optimizer": {"state": {0: {"exp_avg": torch.zeros(4, 4)}}}, "model": w},
        ["'model'"],
    ),
    "with an unrelated mapping": (lambda w: {"teacher": {"head.weight": torch.zeros(9)}, "student": w}, ["'student'"]),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_are_found_by_structure_and_where_is_said(name, tmp_path):
    wrap, words = WRAPPED[name]
    expected = weights()
    loaded = load_model(saved(tmp_path / "w.pt", wrap(expected)), TINY)
    assert same(loaded, expected)
    assert all(word in "; ".join(loaded.notes) for word in words)


def test_of_several_that_differ_the_user_says_which(tmp_path):
    first, second = weights(), weights()
    path = saved(tmp_path / "w.pt", {"model": first, "ema": {"shadow": prefixed("module.")(second)}})
    error = assert_refused(CheckpointError, lambda path: load_model(path, TINY), path)
    assert "model, ema.shadow.module" in error
    for label, expected in (("model", first), ("ema.shadow.module", second)):
        assert same(load_model(path, replace(TINY, weights=label)), expected)
    with pytest.raises(OptionError, match="'optimizer'") as caught:
        load_model(path, replace(TINY, weights="optimizer"))
    assert "ema.shadow.module" in caught.value.hint


@pytest.mark.parametrize("prefix", ["student.", "online_model.", "model."])
def test_one_of_several_models_in_one_flat_mapping(prefix, tmp_path):
    first, second = weights(), weights()
    path = saved(tmp_path / "w.pt", {**prefixed(prefix)(first), **prefixed("teacher.")(second)})
    error = assert_refused(CheckpointError, lambda path: load_model(path, TINY), path)
    assert f"{prefix.rstrip('.')}, teacher" in error
    assert same(load_model(path, replace(TINY, weights=prefix.rstrip("."))), first)


def test_several_that_are_the_same_are_one(tmp_path):
    expected = weights()
    path = saved(tmp_path / "w.pt", {"model": expected, "best": {k: v.clone() for k, v in expected.items()}})
    assert same(load_model(path, TINY), expected)


@pytest.mark.parametrize("wrap", [lambda w: w, prefixed("model."), lambda w: {"state_dict": prefixed("model.")(w)}])
def test_what_belongs_to_other_modules_is_left_over_and_said(wrap, tmp_path):
    expected = weights()
    content = wrap({**expected})
    inner = content.get("state_dict", content)
    inner |= {"criterion.pos_weight": torch.ones(3), "metrics.accuracy.total": torch.tensor(3)}
    loaded = load_model(saved(tmp_path / "w.pt", {**content, "ema_state": {"other.weight": torch.ones(2)}}), TINY)
    assert same(loaded, expected)
    assert any(note.startswith("left over: criterion.pos_weight and ") for note in loaded.notes)


class Migrates(nn.Module):
    """Stores its temperature as a logarithm, since version 2."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(1))

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if (metadata.get("version") or 1) < 2:
            state[f"{prefix}log_temperature"] = state[f"{prefix}log_temperature"].log()
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def forward(self, x):
        return x * self.log_temperature.exp()


def migrating() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), Migrates())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model.state_dict(),
        lambda model: {"model": model.state_dict()},
        lambda model: nn.DataParallel(model).state_dict(),
        lambda model: torch.compile(model).state_dict(),
        lambda model: {"state_dict": nn.ModuleDict({"net": model, "criterion": nn.BatchNorm1d(2)}).state_dict()},
    ],
    ids=["bare", "nested", "data parallel", "compiled", "trainer"],
)
def test_modules_see_the_version_that_their_weights_were_saved_with(wrap, here, tmp_path):
    model = migrating()
    model[1].log_temperature.data.fill_(0.7)
    loaded = load_model(saved(tmp_path / "w.pt", wrap(model)), CompileConfig(model="test_weights:migrating"))
    assert same(loaded, model.state_dict())


def test_weights_of_an_older_version_are_migrated(here, tmp_path):
    content = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2), "1.log_temperature": torch.full((1,), 2.0)}
    loaded = load_model(saved(tmp_path / "w.pt", content), CompileConfig(model="test_weights:migrating"))
    assert loaded.module[1].log_temperature.item() == pytest.approx(torch.tensor(2.0).log().item())


def normalised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.BatchNorm1d(2))


def test_load_hooks_of_the_model_run(here, tmp_path):
    """Weight norm as torch stored it before parametrisations, and a batch norm without its counter."""
    model = normalised()
    content = OrderedDict(
        {
            "0.bias": model[0].bias.detach() + 1,
            "0.weight_g": model[0].parametrizations.weight.original0.detach() + 1,
            "0.weight_v": model[0].parametrizations.weight.original1.detach() + 1,
            **{f"1.{name}": value for name, value in model[1].state_dict().items() if name != "num_batches_tracked"},
        }
    )
    loaded = load_model(saved(tmp_path / "w.pt", content), CompileConfig(model="test_weights:normalised"))
    model.load_state_dict(content)
    assert same(loaded, model.state_dict())


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_model_that_cannot_be_copied_is_given_its_weights(here, tmp_path):
    """Old weight norm keeps the result of an operation, which deepcopy refuses."""
    model = weight_normed()
    loaded = load_model(
        saved(tmp_path / "w.pt", {"model": model.state_dict()}), CompileConfig(model="test_weights:weight_normed")
    )
    assert same(loaded, model.state_dict())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["torch.compile", "DataParallel"])
def test_a_factory_may_return_a_wrapped_model(wrap, here, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "wrapped", lambda: wrap(Tiny()), raising=False)
    monkeypatch.setitem(sys.modules, "test_weights", sys.modules[__name__])
    expected = weights()
    loaded = load_model(saved(tmp_path / "w.pt", expected), CompileConfig(model="test_weights:wrapped"))
    assert same(loaded, expected)
    assert isinstance(loaded.module, Tiny)


def test_weights_of_half_precision_are_read_and_said(tmp_path):
    content = {name: value.half() for name, value in weights().items()}
    loaded = load_model(saved(tmp_path / "w.pt", content), TINY)
    assert all(value.dtype == torch.float32 for value in loaded.module.state_dict().values())
    assert "float16 weights read as float32" in loaded.notes


def test_a_checkpoint_of_asapc_may_be_read_as_another_model(shipped):
    name = "asapc.models.vit:VisionTransformer"
    args = torch.load(shipped, weights_only=True)["model_args"]
    loaded = load_model(shipped, CompileConfig(model=name, model_args=args))
    assert same(loaded, load_model(shipped).module.state_dict())
    assert loaded.calibration is not None


def changed(**changes) -> dict:
    result = weights() | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in result.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (changed(head__bias=None), "head.bias"),
        (changed(head__bias=None, head__weight=None), "and 1 more"),
        (changed(surplus=torch.zeros(1)), "surplus"),
        (changed(head__bias=torch.zeros(3)), "(3,)"),
        (changed(head__bias=torch.tensor([0.0, torch.nan])), "NaN"),
        (changed(head__bias=torch.tensor([0.0, torch.inf])), "infinity"),
        (changed(head__bias=torch.tensor([0.0, torch.nan]).to(torch.float8_e5m2)), "NaN"),
        (changed(head__bias=torch.zeros(2, dtype=torch.int8)), "int8"),
        (changed(head__bias=torch.zeros(2, dtype=torch.complex64)), "complex64"),
        (changed(head__bias=[0.0, 0.0]), "list"),
        ({**weights(), 1: torch.zeros(1)}, "1"),
        ({"_orig_mod.a": torch.zeros(1), "a": torch.zeros(1)}, "lacks"),
        ({"layer": 3}, "no weights"),
        ([torch.zeros(1)], "no weights"),
        (torch.zeros(1), "no weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused(content, word, tmp_path):
    assert word in assert_refused(
        CheckpointError, lambda path: load_model(path, TINY), saved(tmp_path / "w.pt", content)
    )


def test_an_adapter_is_to_be_merged_first(tmp_path):
    adapter = {f"base_model.model.head.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    path = tmp_path / "adapter_model.safetensors"
    save_file(adapter, path)
    with pytest.raises(CheckpointError, match="adapter") as caught:
        load_model(path, TINY)
    assert "merge_and_unload" in caught.value.hint
    # A model that has its adapters inside is loaded as any other.
    merged = weights()
    assert same(load_model(saved(tmp_path / "w.pt", {"model": merged, "adapter": adapter}), TINY), merged)


TIED = CompileConfig(model=f"{Path(__file__).stem}:Tied")


@pytest.fixture
def here(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def test_a_tied_weight_may_come_once_and_a_mask_may_be_infinite(here, tmp_path):
    expected = Tied().state_dict()
    for name in ("embed.weight", "out.weight"):
        content = {key: value for key, value in expected.items() if key != name}
        assert same(load_model(saved(tmp_path / "w.pt", content), TIED), expected)


def test_tied_weights_that_differ_are_refused(here, tmp_path):
    content = {**Tied().state_dict(), "out.weight": torch.zeros(3, 4)}
    assert "one weight for both" in assert_refused(
        CheckpointError, lambda path: load_model(path, TIED), saved(tmp_path / "w.pt", content)
    )


def test_buffers_that_the_model_does_not_save_may_come_too_where_they_are_the_same(tmp_path):
    expected = weights()
    own = Tiny().mask
    assert same(load_model(saved(tmp_path / "w.pt", {**expected, "mask": own}), TINY), expected)
    assert "mask" in assert_refused(
        CheckpointError, lambda path: load_model(path, TINY), saved(tmp_path / "o.pt", {**expected, "mask": own + 1})
    )
