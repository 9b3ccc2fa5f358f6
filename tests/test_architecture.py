"""The shape of the code: which folder imports which, where packages may be imported, how long a file may be.

`docs/architecture.md` says why the folders stand as they do; change it and this table together.
"""

import ast
import graphlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.paths import ROOT

# From the top down: each folder, or file that stands alone, of the library, with all others that it imports.
ARROWS = {
    "cli": "cli_serving cli_timing cli_training terminal doctor showing commands planning relu writing process config "
    "errors version",
    "cli_serving": "terminal commands runtime writing",
    "cli_timing": "terminal showing showing_timing commands writing config errors",
    "cli_training": "terminal training planning",
    "terminal": "showing process config types errors events",
    "doctor": "showing errors version",  # of the library nothing else: it must work where torch does not
    "showing_timing": "showing writing",
    "showing": "writing",
    "commands": "pictures serving planning fidelity timing relu writing backends capturing loading passes config types "
    "errors events version",
    "training": "planning fidelity backends writing loading process config types errors events",
    "planning": "fidelity backends passes ops process config types errors hashes",
    "serving": "writing runtime loading process types errors",
    "writing": "pictures runtime backends capturing loading passes process config types errors hashes version",
    "runtime": "backends loading config types errors",
    "relu": "pictures backends capturing passes types errors version",
    "fidelity": "backends passes types errors",
    "timing": "backends types",
    "backends": "capturing loading passes ops process types errors",
    "capturing": "loading passes types errors",
    "loading": "config types errors hashes",
    "passes": "ops types errors",
    "ops": "types",
    "models": "",  # the finder must work on code that it does not know: nothing knows what is here but by its name
    "config": "types errors",
    "types": "errors",
    "process": "errors",
    "pictures": "",
    "events": "",
    "errors": "",
    "hashes": "",
    "version": "",
}
# Below which modules a package may be imported at all, and whether inside functions only.
PLACES = {
    "rich": (("asapc.terminal",), False),
    "typer": (("asapc.cli", "asapc.cli_serving", "asapc.cli_timing", "asapc.cli_training", "asapc.terminal"), False),
    "onnxruntime": (("asapc.backends.onnxruntime",), True),
    "transformers": (("asapc.loading.described",), True),
    "huggingface_hub": (("asapc.loading.described",), True),
    "jinja2": (("asapc.writing.html", "asapc.writing.usage"), True),
    "matplotlib": (("asapc.pictures", "benchmarks"), False),
    "tensorrt": (("asapc.backends.tensorrt",), True),
    "tensorrt_rtx": (("asapc.backends.tensorrt",), True),
    "cuda.bindings": (("asapc.backends.tensorrt",), True),
    **dict.fromkeys(("kserve", "fastapi", "grpc", "grpc_interceptor"), (("asapc.runtime.kserve",), True)),
}
# Top-level names that exist in a checkout only.
CHECKOUT_ONLY = ("passes", "models", "cli")
MODELS_IMPORT = {"torch", "numpy", *sys.stdlib_module_names}
MAX_LINES = 400


class Import(NamedTuple):
    """One import: who, what, where, and whether inside a function."""

    module: str
    target: str
    place: str
    lazy: bool


def source_files() -> dict[str, Path]:
    """Every source file, by the name under which it is imported."""
    roots = {"asapc": "asapc", "passes": "asapc.passes", "models": "asapc.models", "benchmarks": "benchmarks"}
    files = {"asapc.cli": ROOT / "cli.py"}
    for folder, package in roots.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return files


def below(name: str, package: str) -> bool:
    """Whether a module is the package or stands in it."""
    return name == package or name.startswith(package + ".")


FILES = source_files()
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LIBRARY = {name: path for name, path in FILES.items() if name.split(".")[0] == "asapc" and name != "asapc.cli"}
# Modules that stand in a folder or alone; the package itself and `python -m asapc` only lead to them.
ROOMS = [name for name in FILES if below(name, "asapc") and name not in ("asapc", "asapc.__main__")]
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def nodes(tree: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes of a tree, each with whether it stands inside a function."""
    for node in ast.iter_child_nodes(tree):
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield node, inside
        yield from nodes(node, inside)


def targets(module: str, node: ast.AST) -> list[str]:
    """The modules that a node imports, by statement or by import_module with a fixed name."""
    match node:
        case ast.Import(names=names):
            return [name.name for name in names]
        case ast.ImportFrom(module=base, names=names, level=level):
            if level:  # relative: from the package that the module stands in
                is_package = FILES[module].name == "__init__.py"
                parts = module.split(".")
                parts = parts[: len(parts) - level + is_package]
                base = ".".join([*parts, *([base] if base else [])])
            # `from package import module` imports the module, `from module import name` does not.
            return [f"{base}.{n.name}" if f"{base}.{n.name}" in FILES else str(base) for n in names]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=name), *_]):
            return [name]
    return []


IMPORTS = [
    Import(module, target, f"{FILES[module].relative_to(ROOT)}:{node.lineno}", lazy)
    for module, tree in TREES.items()
    for node, lazy in nodes(tree)
    for target in targets(module, node)
]


def room(module: str) -> str:
    """The folder of a module of the library, or the module itself where it stands alone."""
    return module.split(".")[1] if "." in module else module


def show(imports: list[Import]) -> str:
    """Imports that are against a rule, one a line."""
    return "".join(f"\n  {i.place}: {i.module} -> {i.target}" for i in imports)


def test_the_arrows_between_folders_are_those_of_the_table():
    arrows = defaultdict[str, set[str]](set)
    for i in IMPORTS:
        origin, aim = room(i.module), room(i.target)
        if i.module in ROOMS and below(i.target, "asapc") and aim not in ("asapc", origin):
            arrows[origin].add(aim)
    assert arrows == {origin: set(aims.split()) for origin, aims in ARROWS.items() if aims}
    assert {room(module) for module in ROOMS} == set(ARROWS)


def test_arrows_point_down_the_table():
    order = list(ARROWS)
    upward = [(o, a) for o, aims in ARROWS.items() for a in aims.split() if order.index(a) <= order.index(o)]
    assert upward == []


def test_imports_make_no_circle():
    graph = {name: {i.target for i in IMPORTS if i.module == name and i.target in FILES} - {name} for name in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


def test_packages_are_imported_in_their_own_place_only():
    wrong = [
        i
        for i in IMPORTS
        for package, (places, lazily) in PLACES.items()
        if below(i.target, package) and (not any(below(i.module, place) for place in places) or (lazily and not i.lazy))
    ]
    assert not wrong, show(wrong)


def test_models_know_nothing_of_the_compiler():
    wrong = [
        i
        for i in IMPORTS
        if below(i.module, "asapc.models")
        and i.target.split(".")[0] not in MODELS_IMPORT
        and not below(i.target, "asapc.models")
    ]
    assert not wrong, show(wrong)


def test_names_that_exist_in_a_checkout_only_are_not_imported():
    wrong = [i for i in IMPORTS if i.target.split(".")[0] in CHECKOUT_ONLY]
    assert not wrong, show(wrong)


def test_benchmarks_are_never_imported():
    wrong = [i for i in IMPORTS if below(i.target, "benchmarks") and not below(i.module, "benchmarks")]
    assert not wrong, show(wrong)


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_prints_nothing(name):
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"] == []


def test_no_source_file_is_too_long_to_read():
    lines = {path.relative_to(ROOT): path.read_text().count("\n") for path in [*FILES.values(), *TESTS]}
    assert {str(path): count for path, count in lines.items() if count > MAX_LINES} == {}


def test_the_rules_see_what_they_are_about():
    """The walker finds imports of every form; without it the rules above would hold of nothing."""
    code = """
import asapc.config
from asapc import loading
from asapc.ops.sinkhorn import plan
from . import base
def function():
    import onnxruntime
    importlib.import_module("tensorrt")
"""
    result = [
        (target, lazy) for node, lazy in nodes(ast.parse(code)) for target in targets("asapc.passes.record", node)
    ]
    assert result == [
        ("asapc.config", False),
        ("asapc.loading", False),
        ("asapc.ops.sinkhorn", False),
        ("asapc.passes.base", False),
        ("onnxruntime", True),
        ("tensorrt", True),
    ]
    assert {"asapc.cli", "asapc.passes.base", "asapc.models.vit", "asapc.backends.tensorrt.builder"} <= FILES.keys()
    assert len(IMPORTS) > 100
