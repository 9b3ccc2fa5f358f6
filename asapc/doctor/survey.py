"""Collects the facts about this machine. Nothing here may raise, whatever is broken."""

import csv
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asapc.doctor.facts import Driver, Facts, Folder, Gpu, Module, Requirement
from asapc.doctor.probes import COMPILER, CUDA, LATER, MODULES, probe
from asapc.errors import one_line, printable
from asapc.version import __version__

DEVELOPERS = "dev"  # the extra that nobody misses
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
QUERY = "name,compute_cap,memory.total,driver_version"
MEBIBYTE = 2**20


def collect() -> Facts:
    """Return the facts about this machine and its installation, after some seconds."""
    codes = {name: (name, code) for name, code in MODULES.items()}
    answers = probe({**codes, "compiler": (COMPILER, LATER), "cuda": ("ctypes", CUDA)})
    cuda = answers.pop("cuda")
    compiler = Module(**answers.pop("compiler"))
    driver, gpus = driver_and_gpus(cuda)
    requires_python, python_fits, requirements, error = requirements_of("asapc")
    return Facts(
        asapc=__version__,
        system=f"{platform.system()}-{platform.machine()}",
        python=platform.python_version(),
        executable=sys.executable,
        requires_python=requires_python,
        python_fits=python_fits,
        metadata_error=error,
        requirements=requirements,
        modules={name: module(name, answer) for name, answer in answers.items()},
        runtimes=distributions("onnxruntime", RUNTIMES),
        compiler=compiler,
        driver=driver,
        gpus=gpus,
        folders=tuple(folders()),
    )


def module(name: str, answer: dict[str, Any]) -> Module:
    """Make a module of a probe's answer; one without a version of its own has that of its distribution."""
    if answer["installed"] and answer.get("version") is None:
        answer = {**answer, "version": version_of(name.replace(".", "-"))}
    return Module(**answer)


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except Exception:  # damaged metadata raises whatever reading it does
        return None


def distributions(top: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the installed distributions that hold a top-level module, and which of the known ones are installed."""
    try:
        found = set(importlib.metadata.packages_distributions().get(top, ()))
    except Exception:  # damaged metadata, of whichever package
        found = set()
    return tuple(sorted(found | {name for name in known if version_of(name) is not None}))


def requirements_of(distribution: str) -> tuple[str | None, bool, tuple[Requirement, ...], str | None]:
    """Return the range of Python, whether this one is in it, the requirements, and why they are unknown if so."""
    try:
        from packaging.requirements import Requirement as Parsed
        from packaging.specifiers import SpecifierSet

        metadata = importlib.metadata.metadata(distribution)
        python = metadata["Requires-Python"]
        parsed = [Parsed(line) for line in importlib.metadata.requires(distribution) or ()]
        requirements = list[Requirement]()
        for extra in ("", *(extra for extra in metadata.get_all("Provides-Extra") or () if extra != DEVELOPERS)):
            for line in parsed:
                always = line.marker is None or line.marker.evaluate({"extra": ""})
                if always if extra else not always:
                    continue
                if not always and line.marker is not None and not line.marker.evaluate({"extra": extra}):
                    continue
                version = version_of(line.name)
                fits = version is not None and line.specifier.contains(version, prereleases=True)
                text = f"{line.name}{line.specifier}"
                requirements.append(Requirement(text, line.name, extra or None, version, fits))
        fits = python is None or SpecifierSet(python).contains(platform.python_version(), prereleases=True)
    except Exception as error:  # packaging or the metadata are missing or damaged
        return None, True, (), one_line(error)
    return python, fits, tuple(requirements), None


def driver_and_gpus(answer: dict[str, Any]) -> tuple[Driver | None, tuple[Gpu, ...]]:
    """Return the driver and the GPUs, by nvidia-smi where it answers, else by CUDA, else by the kernel's files.

    Args:
        answer: of the probe `CUDA`.
    """
    details = answer.get("details", {})
    version, gpus, failure = by_nvidia_smi()
    gpus = gpus or tuple(Gpu(**gpu) for gpu in details.get("gpus", ()))
    kernel_version, kernel_gpus = by_kernel()
    version, gpus = version or kernel_version, gpus or kernel_gpus
    if version is None and not details and failure is None:
        return None, gpus
    code = details.get("code")
    if code is None:
        error = failure or answer.get("error")
    else:
        error = None if code == 0 else f"cuInit returns {code}"
    return Driver(version, details.get("cuda"), error), gpus


def by_nvidia_smi() -> tuple[str | None, tuple[Gpu, ...], str | None]:
    """Return the driver's version, the GPUs that nvidia-smi lists, and what it says where it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, (), None
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, (), f"nvidia-smi does not run: {one_line(error)}"
    if ran.returncode != 0:
        words = printable(" ".join((ran.stdout + ran.stderr).split()))
        return None, (), f"nvidia-smi fails: {words[:200] or f'it returns {ran.returncode}'}"
    version, gpus = None, list[Gpu]()
    for row in csv.reader(ran.stdout.splitlines(), skipinitialspace=True):
        if len(row) != len(QUERY.split(",")):
            continue
        name, capability, memory, version = row
        architecture = f"SM{capability.replace('.', '')}" if capability[:1].isdigit() else None
        size = int(memory) * MEBIBYTE if memory.isdecimal() else None
        gpus.append(Gpu(printable(name), architecture, size))
    return version, tuple(gpus), None


def by_kernel() -> tuple[str | None, tuple[Gpu, ...]]:
    """Return the driver's version and the GPUs that Linux lists, which it does even where CUDA does not start."""
    root = Path("/proc/driver/nvidia")
    try:
        words = (root / "version").read_text().splitlines()[0].split()
        version = next((word for word in words if word[:1].isdigit() and "." in word), None)
        files = sorted((root / "gpus").glob("*/information"))
        models = [line for file in files for line in file.read_text().splitlines() if line.startswith("Model:")]
    except (OSError, IndexError):
        return None, ()
    return version, tuple(Gpu(printable(line.removeprefix("Model:").strip())) for line in models)


def folders() -> Iterator[Folder]:
    """Yield the folders that asapc writes into."""
    try:
        temporary = tempfile.gettempdir()
    except OSError:  # none can be written
        yield Folder("temporary files", os.environ.get("TMPDIR", "/tmp"), 0, writable=False)
    else:
        yield folder("temporary files", Path(temporary))
    try:
        import platformdirs

        yield folder("cache", platformdirs.user_cache_path("asapc", appauthor=False))
    except Exception:  # platformdirs is missing or broken, or there is no home; requirements name it
        pass
    try:
        yield folder("output", Path.cwd())
    except OSError:  # it was deleted
        yield Folder("output", ".", 0, writable=False)


def folder(use: str, path: Path) -> Folder:
    """Measure a folder, or the nearest one above that exists."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    try:
        free = shutil.disk_usage(path).free
    except OSError:
        free = None
    return Folder(use, printable(str(path)), free, os.access(path, os.W_OK))
