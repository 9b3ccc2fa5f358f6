"""The shape of the code: which module may import which, where packages may be imported, how long a file may be.

The rule is section 1 of the design: imports point down this table, never up. Where the code has to change, change
the design and this table together, and say why in docs/architecture.md.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the top down. A module may import those of its own layer and of the layers below.
LAYERS = {
    "entry points": ("asapc", "asapc.__main__", "asapc.cli", "benchmarks"),
    "line": ("asapc.pipeline", "asapc.recheck"),
    "stages": (
        "asapc.loading",
        "asapc.archives",
        "asapc.exported",
        "asapc.onnx_call",
        "asapc.onnx_graph",
        "asapc.onnx_import",
        "asapc.onnx_layers",
        "asapc.onnx_ops",
        "asapc.onnx_reader",
        "asapc.onnx_shapes",
        "asapc.onnx_views",
        "asapc.factories",
        "asapc.pt2_archive",
        "asapc.pt2_graph",
        "asapc.gather",
        "asapc.samples",
        "asapc.inputs",
        "asapc.tensors",
        "asapc.weights",
        "asapc.capture",
        "asapc.dynamic",
        "asapc.early_stop",
        "asapc.distributed",
        "asapc.calibrate",
        "asapc.fit",
        "asapc.costs",
        "asapc.ranges",
        "asapc.operators",
        "asapc.relu_fit",
        "asapc.approx",
        "asapc.activations",
        "asapc.propose",
        "asapc.plan",
        "asapc.verify",
        "asapc.measure",
        "asapc.report",
        "asapc.output",
        "asapc.export",
        "asapc.environment",
        "asapc.backends.*",
    ),
    "passes": ("asapc.passes.*",),
    "operators": ("asapc.ops.*",),
    "ground": (
        "asapc.shapes",
        "asapc.artifacts",
        "asapc.choices",
        "asapc.results",
        "asapc.config",
        "asapc.errors",
        "asapc.events",
        "asapc.version",
    ),
}
# Arrows that the layers alone would allow.
FORBIDDEN = {
    "asapc.capture": ("asapc.backends", "asapc.fit"),
    "asapc.fit": ("asapc.backends", "asapc.capture"),
    # The finder must work on code that it does not know; the command may train what the repository ships.
    "asapc": ("asapc.models",),
}
# Where a package may be imported at all, and whether inside functions only.
PLACES = {
    "rich": ("asapc.cli", False),
    "typer": ("asapc.cli", False),
    "onnxruntime": ("asapc.backends.onnxruntime", True),
    "tensorrt": ("asapc.backends.tensorrt", True),
    "tensorrt_rtx": ("asapc.backends.tensorrt", True),
}
# Top-level names that exist in a checkout only.
CHECKOUT_ONLY = ("passes", "models", "cli")
MODELS_IMPORT = {"torch", "numpy", *sys.stdlib_module_names}
LONGEST_FILE = 300


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


FILES = source_files()
LIBRARY = {name: path for name, path in FILES.items() if name.split(".")[0] == "asapc" and name != "asapc.cli"}
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


def below(name: str, package: str) -> bool:
    """Whether a module is the package or stands in it."""
    return name == package or name.startswith(package + ".")


def layer(module: str) -> int | None:
    """Index of a module's layer, 0 at the top; None where the table does not have it."""
    for index, names in enumerate(LAYERS.values()):
        for name in names:
            package = name.removesuffix(".*")
            if module == package or (name in ("benchmarks", package + ".*") and below(module, package)):
                return index
    return None


def show(imports: list[Import]) -> str:
    """Imports that are against a rule, one a line."""
    return "".join(f"\n  {i.place}: {i.module} -> {i.target}" for i in imports)


def test_every_module_has_its_layer():
    assert [name for name in FILES if layer(name) is None and not below(name, "asapc.models")] == []


def test_imports_point_down():
    wrong = [
        i
        for i in IMPORTS
        if (origin := layer(i.module)) is not None and (aim := layer(i.target)) is not None and aim < origin
    ]
    assert not wrong, show(wrong)


def test_arrows_that_are_forbidden_by_name_do_not_exist():
    def forbidden(i: Import) -> bool:
        # "asapc" stands for every module of the library but the models themselves.
        return any(
            below(i.module, origin) and not below(i.module, "asapc.models") and i.module != "asapc.cli"
            for origin, aims in FORBIDDEN.items()
            if any(below(i.target, aim) for aim in aims)
        )

    wrong = [i for i in IMPORTS if forbidden(i)]
    assert not wrong, show(wrong)


def test_imports_make_no_circle():
    graph = {name: {i.target for i in IMPORTS if i.module == name and i.target in FILES} - {name} for name in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


def test_packages_are_imported_in_their_own_place_only():
    wrong = [
        i
        for i in IMPORTS
        for package, (place, lazily) in PLACES.items()
        if below(i.target, package) and (not below(i.module, place) or (lazily and not i.lazy))
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


@pytest.mark.parametrize("name", LIBRARY)
def test_no_source_file_is_too_long_to_read(name):
    lines = FILES[name].read_text().count("\n")
    assert lines <= LONGEST_FILE


def test_the_rules_see_what_they_are_about():
    """The walker finds imports of every form; without it the rules above would hold of nothing."""
    code = """
import asapc.plan
from asapc import loading
from asapc.ops.sinkhorn import plan
from . import base
def function():
    import onnxruntime
    importlib.import_module("tensorrt")
"""
    found = [(target, lazy) for node, lazy in nodes(ast.parse(code)) for target in targets("asapc.passes.record", node)]
    assert found == [
        ("asapc.plan", False),
        ("asapc.loading", False),
        ("asapc.ops.sinkhorn", False),
        ("asapc.passes.base", False),
        ("onnxruntime", True),
        ("tensorrt", True),
    ]
    assert {"asapc.cli", "asapc.passes.base", "asapc.models.vit", "asapc.backends.tensorrt.builder"} <= FILES.keys()
    assert len(IMPORTS) > 100
