"""Fixtures that several test files share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import documents
from helpers.paths import ROOT
from helpers.quick import quick_compilation
from hypothesis import settings

import asapc
from asapc.__main__ import CYCLES
from asapc.models.pointset import PointTransformer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put those first that share a folder, and those together that share a model: one process then takes them all."""

    def place(item: pytest.Item) -> tuple[bool, Path, str]:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        return "readme_folder" not in getattr(item, "fixturenames", ()), item.path, getattr(case, "name", "")

    items.sort(key=place)


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The trained checkpoint that the repository ships."""
    return ROOT / "models" / "digits.pt"


# The same examples in every run: whether a change passes must not hang on the draw. Fuzzing proper is a benchmark.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")

gc.set_threshold(*CYCLES)

# Tests keep all cores busy, and small operations then lose most of their time to threads that wait for each other, in
# the processes that tests start too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def common(tmp_path_factory) -> Path:
    """Return a folder that all processes of pytest-xdist have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def readme_folder(tmp_path_factory) -> Path:
    """A folder as the README assumes it, with the checkout's models/ in it, after the first command that compiles."""
    folder = common(tmp_path_factory) / "readme"  # it takes a minute
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "models").symlink_to(ROOT / "models")
            # Less time to measure than the 10 seconds a batch that are the default.
            documents.run(["-m", "asapc.cli", *documents.FIRST_COMPILE.split()[1:], "--seconds", "1"], folder)
    return folder


@pytest.fixture
def quick() -> Iterator[None]:
    """See `helpers.quick`."""
    with quick_compilation():
        yield


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory) -> None:
    """Keep the user's cache and key out of the tests, and the tests out of them, in processes that they start too."""
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        os.environ[name] = str(common(tmp_path_factory) / name)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def point_model(tmp_path_factory):
    """A small teacher on sets of 24 points, and a function that compiles it exactly, with options."""
    folder = tmp_path_factory.mktemp("points")
    sizes = {"width": 16, "heads": 2, "depth": 1, "iterations": 2}
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    teacher = PointTransformer(**sizes).eval()
    torch.save(teacher.state_dict(), folder / "model.pt")
    torch.save({"points": torch.randn(32, 24, 3, generator=generator)}, folder / "samples.pt")
    fixed = {"model": "asapc.models.pointset:PointTransformer", "model_args": sizes, "calib": folder / "samples.pt"}
    quick = {"level": 1, "batches": (1,), "seconds": 0.1, "threads": 1}

    def compile_it(**options):
        out = tmp_path_factory.mktemp("compiled") / "out"
        with quick_compilation():
            return asapc.compile(folder / "model.pt", out=out, **fixed, **quick, **options)

    return teacher, compile_it
