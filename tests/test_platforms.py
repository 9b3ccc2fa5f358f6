"""asapc installs on other platforms than this: its markers name packages that have builds there."""

import platform
import re
import socket
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.paths import ROOT
from helpers.slow import slow_beyond
from packaging.markers import default_environment
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# By the platform as pip names it: its system and machine as Python does.
PLATFORMS = {
    "manylinux_2_28_x86_64": ("Linux", "x86_64"),
    "manylinux_2_28_aarch64": ("Linux", "aarch64"),
    "win_amd64": ("Windows", "AMD64"),
    "macosx_14_0_arm64": ("Darwin", "arm64"),
}
GPU = ("manylinux_2_28_x86_64", "win_amd64")  # where onnxruntime-gpu and TensorRT-RTX have builds
# A source distribution without code, which names these two of its own version.
PARTS = {"tensorrt-rtx-cu12": ("tensorrt-rtx-cu12-bindings", "tensorrt-rtx-cu12-libs")}


def requirements(name: str) -> list[Requirement]:
    """What pip would install on a platform."""
    system, machine = PLATFORMS[name]
    environment = {**default_environment(), "platform_system": system, "platform_machine": machine}
    environment |= {"sys_platform": {"Windows": "win32"}.get(system, system.lower()), "python_version": "3.11"}
    parsed = map(Requirement, PROJECT["dependencies"])
    return [item for item in parsed if item.marker is None or item.marker.evaluate(environment)]


def releases(package: str, name: str) -> list[str]:
    """The versions of a package that have a wheel for a platform, by the index alone: no wheel is fetched."""
    machine = PLATFORMS[name][1]
    # Builds for older systems serve too; pip adds those of macOS by itself.
    older = [f"manylinux_2_{n}_{machine}" for n in range(17, 28)] if name.startswith("manylinux") else []
    command = [sys.executable, "-m", "pip", "index", "versions", package, "--retries=2", "--timeout=10"]
    command += ["--only-binary=:all:", "--python-version=3.11", *(f"--platform={tag}" for tag in (name, *older))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    line = re.search(r"^Available versions: (.*)$", ran.stdout, flags=re.MULTILINE)
    return line[1].split(", ") if line else []


def online() -> bool:
    try:
        socket.create_connection(("pypi.org", 443), timeout=3).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", PLATFORMS)
def test_each_platform_gets_one_onnx_runtime(name):
    names = [item.name for item in requirements(name) if item.name.startswith("onnxruntime")]
    assert names == ["onnxruntime-gpu" if name in GPU else "onnxruntime"]
    assert ("tensorrt-rtx-cu12" in {item.name for item in requirements(name)}) == (name in GPU)


def test_this_platform_is_judged_as_pip_does():
    here = (platform.system(), platform.machine())
    names = {item.name for name in PLATFORMS if PLATFORMS[name] == here for item in requirements(name)}
    by_pip = {
        item.name for item in map(Requirement, PROJECT["dependencies"]) if not item.marker or item.marker.evaluate()
    }
    assert here not in PLATFORMS.values() or names == by_pip


@pytest.mark.parametrize("name", slow_beyond(PLATFORMS))
def test_every_requirement_has_a_wheel_for_each_platform(name):
    if not online():
        pytest.skip("there is no network")
    items = [(part, item.specifier) for item in requirements(name) for part in PARTS.get(item.name, (item.name,))]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda item: releases(item[0], name), items))
    lacks = [part for (part, bounds), versions in zip(items, found, strict=True) if not any(bounds.filter(versions))]
    assert lacks == []


def test_a_platform_without_a_build_is_noticed():
    if not online():
        pytest.skip("there is no network")
    assert releases("onnxruntime-gpu", "macosx_14_0_arm64") == []
    assert releases("onnxruntime-gpu", "manylinux_2_28_aarch64") == []
    assert releases("onnxruntime", "macosx_14_0_arm64") != []
