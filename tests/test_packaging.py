"""What lands in site-packages, what type checkers see, and what an import costs. The wheel is built in .ci/run."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.paths import ROOT

TYPINGS = ROOT / "typings" / "asapc"
CHECKOUT_ONLY = ("passes", "models", "cli.py")  # beside asapc/ in a checkout, inside it in a wheel
FOLDERS = {"asapc": "asapc", "passes": "asapc.passes", "models": "asapc.models"}
# Not needed until the command or a backend runs.
OPTIONAL = ("onnxruntime", "tensorrt", "tensorrt_rtx", "onnxscript", "rich", "typer")


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "__pycache__" and path.suffix != ".json"}


def run(code: str, folder: Path) -> str:
    """Standard output of a fresh interpreter, started away from the checkout."""
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_list_of_packages_is_that_of_the_folders():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == on_disk
    assert len(setuptools["packages"]) == len(on_disk)
    assert setuptools["package-dir"] == {package: folder for folder, package in FOLDERS.items()}


def test_every_folder_with_source_is_a_package():
    for top in ("asapc", "passes", "models"):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} would drop out of the wheel"


def test_the_files_that_the_library_reads_are_package_data():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert (ROOT / "asapc" / "py.typed").is_file()
    carried = {path.name for path in (ROOT / "asapc" / "planning").glob("*.costs.json")}
    assert carried == {"cpu.costs.json", "cuda-float32.costs.json", "cuda-float16.costs.json"}
    assert data["asapc"] == ["py.typed"]
    assert data["asapc.loading"] == ["*.schema.json"]
    assert data["asapc.planning"] == ["*.costs.json"]
    assert data["asapc.models"] == ["data/*", "recipes/*"]
    assert data["asapc.writing"] == ["templates/*"]
    templates = {path.name for path in (ROOT / "asapc" / "writing" / "templates").iterdir()}
    assert templates == {"report.html", "report.css", "README.md.j2"}
    assert data["asapc.serving"] == ["templates/*"]
    parts = {path.name for path in (ROOT / "asapc" / "serving" / "templates").iterdir()}
    assert parts == {"Containerfile", "README.md", "requirements.in", "requirements.txt", "settings.toml"}
    assert (ROOT / "models" / "data" / "digits.npz").is_file()


def test_type_checkers_see_every_module_through_a_link():
    assert entries(TYPINGS) == entries(ROOT / "asapc") | set(CHECKOUT_ONLY)


def test_every_link_for_type_checkers_leads_to_its_module():
    for link in TYPINGS.iterdir():
        assert link.is_symlink(), link
        home = ROOT if link.name in CHECKOUT_ONLY else ROOT / "asapc"
        assert link.resolve() == home / link.name
        assert link.exists(), link
        assert not link.readlink().is_absolute(), f"{link} breaks in every other checkout"


def test_importing_asapc_alone_imports_no_torch(tmp_path):
    heavy = run("import sys, asapc; print({'torch', 'numpy', 'onnx'} & sys.modules.keys())", tmp_path)
    assert heavy.strip() == "set()"


def test_the_public_names_resolve(tmp_path):
    code = """
import asapc
for name in asapc.__all__:
    getattr(asapc, name)
assert callable(asapc.compile) and callable(asapc.load)
assert asapc.CompileReport.__name__ == "CompileReport"
assert asapc.CompileConfig().seed == 0 and issubclass(asapc.AsapcError, Exception)
print(asapc.__version__)
"""
    assert run(code, tmp_path).strip().count(".") == 2


def test_a_name_that_asapc_does_not_have_is_an_attribute_error():
    import asapc

    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        asapc.nothing_of_the_kind  # noqa: B018


def modules() -> list[str]:
    """Every module of the library by name, the command apart: it needs rich and typer."""
    names = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name in ("__main__.py", "terminal.py") or path.name.startswith("cli_"):  # the command again
                continue
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return names


def test_every_module_imports_without_the_optional_packages(tmp_path):
    code = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
for name in {modules()}:
    importlib.import_module(name)
print(len(sys.modules.keys() & {set(modules())}))
"""
    assert {"asapc.commands.compile", "asapc.passes.find.sinkhorn", "asapc.models.vit"} <= set(modules())
    assert int(run(code, tmp_path)) == len(modules())


def test_the_blocker_of_that_test_does_block(tmp_path):
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "typer":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
try:
    import asapc.cli
except ImportError as error:
    print(error)
"""
    assert run(code, tmp_path).strip() == "blocked"


def test_a_users_own_models_and_passes_stay_reachable(tmp_path):
    """A checkpoint, or a script, that names the user's own `models.vit` must not get asapc's."""
    for name in ("models", "passes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    code = "import asapc.models.vit, asapc.passes.base, models, passes; print(models.MINE, passes.MINE)"
    assert run(code, tmp_path).strip() == "True True"
