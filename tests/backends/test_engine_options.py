"""What engines may be asked for, by package, and how that reaches NVIDIA's interface."""

import enum
import sys
from types import SimpleNamespace

import pytest
import torch

from asapc.backends.tensorrt.builder import check_options
from asapc.backends.tensorrt.flavours import configure, lacks, load_timings, open_package, save_timings, strongly_typed
from asapc.backends.tensorrt.profiles import narrowed
from asapc.config import CompileConfig
from asapc.errors import BuildError, OptionError
from asapc.types.engine import EngineOptions, parse_memory
from asapc.types.graph import DynamicAxis


class Timings:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class Config:
    """An IBuilderConfig that notes what it is told."""

    def __init__(self) -> None:
        self.flags, self.limits = [], {}

    def set_flag(self, flag) -> None:
        self.flags.append(flag)

    def set_memory_pool_limit(self, pool, size) -> None:
        self.limits[pool] = size

    def create_timing_cache(self, content: bytes) -> Timings | None:
        return None if content.startswith(b"damaged") else Timings(content)

    def set_timing_cache(self, cache, ignore_mismatch) -> bool:
        if cache is None:
            raise TypeError("incompatible function arguments")
        self.cache = cache
        return not cache.content.startswith(b"foreign")

    def get_timing_cache(self) -> Timings:
        return Timings(self.cache.content + b"+")


class Typing(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


def tensorrt(version: str) -> SimpleNamespace:
    """What `tensorrt` of a version offers: 11 has no flag for strong typing, since all its networks are."""
    return SimpleNamespace(
        __version__=version,
        IBuilderConfig=Config,
        BuilderFlag=SimpleNamespace(VERSION_COMPATIBLE="version"),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        NetworkDefinitionCreationFlag=Typing if version.startswith("10") else SimpleNamespace(),
    )


@pytest.mark.parametrize(("version", "flags"), [("10.9.0", 2), ("11.4.0", 0)])
def test_networks_are_strongly_typed_in_every_version(version, flags):
    assert strongly_typed(tensorrt(version)) == flags


@pytest.mark.parametrize("version", ["10.9.0", "11.4.0"])
def test_tensorrt_is_told_what_is_asked(version):
    trt, config = tensorrt(version), Config()
    assert list(lacks(trt)) == ["--gpu-arch"]
    configure(trt, config, {"workspace": 2**21, "version_compatible": True, "hardware_compatible": True})
    assert (config.flags, config.limits) == (["version"], {"workspace": 2**21})
    assert (config.hardware_compatibility_level, config.profiling_verbosity) == ("ampere", "detailed")
    untouched = Config()
    configure(trt, untouched, {"workspace": None, "version_compatible": False, "hardware_compatible": False})
    assert (untouched.flags, untouched.limits) == ([], {})


def test_what_an_installed_version_lacks_is_named():
    trt = tensorrt("11.4.0")
    del trt.BuilderFlag.VERSION_COMPATIBLE, trt.HardwareCompatibilityLevel
    trt.IBuilderConfig = object
    assert set(lacks(trt)) == {"--gpu-arch", "--timing-cache", "--version-compatible", "--hardware-compatible"}


def test_a_version_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt("10.8.0"))
    with pytest.raises(BuildError, match=r"TensorRT 10\.8\.0 is installed, and is too old"):
        open_package("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt("10.13.2"))
    assert open_package("tensorrt").__version__ == "10.13.2"


@pytest.mark.parametrize("content", [None, b"good", b"damaged", b"foreign"])
def test_times_of_kernels_are_read_kept_and_measured_anew_where_they_cannot_be_used(content, tmp_path):
    path, config = tmp_path / "times", Config()
    if content is not None:
        path.write_bytes(content)
    note = load_timings(config, path)
    assert (note is not None) == (content in (b"damaged", b"foreign"))
    save_timings(config, path)
    assert path.read_bytes() == (b"good+" if content == b"good" else b"+")
    assert [file.name for file in tmp_path.iterdir()] == ["times"]


@pytest.fixture
def ahead_of_time(monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_arch": "sm90"}, "does not build for sm90"),
        ({"gpu_arch": "sm86,banana"}, "does not build for banana"),
        ({"timing_cache": "times"}, "has no --timing-cache"),
        ({"version_compatible": True}, "has no --version-compatible"),
        ({"hardware_compatible": True}, "has no --hardware-compatible"),
    ],
)
def test_tensorrt_rtx_refuses_by_name_what_it_cannot_do(options, message, ahead_of_time):
    with pytest.raises(OptionError, match=message) as caught:
        check_options("tensorrt-rtx", CompileConfig(**options).engine_options())
    assert "gpu-arch" not in options or "sm86" in caught.value.hint


def test_tensorrt_rtx_takes_architectures_and_a_workspace(ahead_of_time):
    check_options("auto", EngineOptions(("SM86", "SM120"), 2**30))


@pytest.mark.parametrize("target", ["onnx", "cuda"])
def test_options_of_an_engine_are_refused_where_none_is_built(target):
    check_options(target, EngineOptions())
    with pytest.raises(OptionError, match=f"--workspace is about an engine, and --target {target} builds none"):
        check_options(target, EngineOptions(workspace=2**30))


@pytest.mark.parametrize(
    ("text", "size"),
    [("", None), ("512", 2**29), ("2GB", 2 * 10**9), ("2 gib", 2**31), ("1.5GiB", 3 * 2**29), ("1TB", 10**12)],
)
def test_memory_is_read_in_mib_or_a_unit(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "options",
    [
        *({"workspace": text} for text in ("0", "-1", "3XB", "GB", "1e3", "0.5", "nan", "9" * 30)),
        *({"gpu_arch": text} for text in (",", "sm86,", "sm86,SM86")),
        *({"profile": (text,)} for text in ("x", "x=1x2", "x=1:2", "x=1x2:2:3", "x=2:1:3", "x=0:1:2", "=1:1:1")),
        {"profile": ("x=1:2:3", "x=1:2:4")},
    ],
)
def test_what_cannot_be_read_is_refused_with_the_form(options):
    with pytest.raises(OptionError) as caught:
        CompileConfig(**options)
    assert caught.value.hint


SHAPES = {"x": (2, 12, 8), "mask": (2, 12)}
AXES = {name: {0: DynamicAxis("batch", 1, None), 1: DynamicAxis("seq", 4, 64)} for name in SHAPES}


def test_axes_of_one_name_follow_the_input_that_a_profile_names():
    sizes = narrowed({"x": ((1, 4, 8), (16, 32, 64), (8, 8, 8))}, SHAPES, AXES, 32)
    assert sizes == {name: {0: (1, 4, 8), 1: (16, 32, 64)} for name in SHAPES}
    whole = {0: (1, 32, 32), 1: (4, 64, 64)}
    assert narrowed({}, SHAPES, AXES, 32) == dict.fromkeys(SHAPES, whole)


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ({"y": ((1, 1, 1),)}, "names 'y', no input"),
        ({"x": ((1, 1, 1),)}, "gives x 1 axes, and it has 3"),
        ({"x": ((1, 1, 1), (4, 4, 4), (8, 8, 9))}, "axis 2 of x 8:8:9, and it is fixed at 8"),
        ({"x": ((1, 1, 1), (2, 4, 4), (8, 8, 8))}, "axis 1 of x 2:4:4, and it goes from 4 to 64"),
        ({"x": ((1, 1, 1), (4, 4, 65), (8, 8, 8))}, "goes from 4 to 64"),
        ({"x": ((1, 2, 3), (4, 4, 4), (8, 8, 8)), "mask": ((1, 2, 4), (4, 4, 4))}, "elsewhere batch has 1:2:3"),
    ],
)
def test_profiles_that_do_not_fit_the_inputs_are_refused(profiles, message):
    with pytest.raises(OptionError, match=message) as caught:
        narrowed(profiles, SHAPES, AXES, 32)
    assert caught.value.hint
