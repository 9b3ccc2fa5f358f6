"""Tells from the code of a model whether a question about data only ends a loop.

A graph takes one path. A loop that asks whether to stop can be run to its bound instead, and what that changes can be
measured; any other branch on data would be compiled as one of its sides, without a word, and is refused. Where the
question stands is told by Python itself: the instruction that asks has a place in the source.
"""

import ast
import linecache
from functools import cache
from itertools import pairwise
from types import CodeType, FrameType
from typing import NamedTuple

# Code that Python makes of a part of a statement: what asks there asks for the statement around it.
PARTS_OF_STATEMENTS = ("<lambda>", "<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>")
LOOPS = (ast.For, ast.While, ast.AsyncFor)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
LEAVES = (ast.Break, ast.Return, ast.Raise)
CHECKS = ("assert", "_assert", "_check")  # functions that stop the program, of torch, its tests and those of others


class Place:
    """Where a frame stands in the source.

    Args:
        frame: of the user's code.

    Attributes:
        path: nodes from the function, or the module, down to the expression that is being evaluated; empty where there
            is no source.
    """

    def __init__(self, frame: FrameType) -> None:
        positions = list(frame.f_code.co_positions())[frame.f_lasti // 2]
        line, end_line, column, end_column = positions
        self.path: list[ast.AST] = []
        if line is None or end_line is None or column is None or end_column is None:
            return
        node: ast.AST | None = function_of(frame.f_code)
        while node is not None:
            self.path.append(node)
            node = next(
                (child for child in ast.iter_child_nodes(node) if spans(child, (line, column), (end_line, end_column))),
                None,
            )

    @property
    def statement(self) -> ast.stmt | None:
        """The innermost statement."""
        return next((node for node in reversed(self.path) if isinstance(node, ast.stmt)), None)

    def asks(self, branch: ast.If | ast.While | ast.IfExp) -> bool:
        """Return whether the question tests a branch; Python gives the jump the place of the branch as a whole."""
        return self.path[-1] is branch or branch.test in self.path

    @property
    def in_loop(self) -> bool:
        """Whether a loop of the same function is around the statement."""
        above = self.path[: self.path.index(self.statement)] if self.statement in self.path else []
        return any(isinstance(node, LOOPS) for node in above)


class Leaving(NamedTuple):
    """What a question decides that decides on nothing but leaving.

    Attributes:
        frame: of the code that is left.
        loop: whether a loop is left; else the program is stopped, by `assert` or `if ...: raise`, or something is
            printed.
    """

    frame: FrameType
    loop: bool


def find_leaving(frame: FrameType | None, skipped: str) -> Leaving | None:
    """Return what a question of a frame decides on leaving; None where it decides anything else.

    Args:
        frame: the code that asks.
        skipped: folder whose code only passes on what is returned to it, as torch's does.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_name in PARTS_OF_STATEMENTS or code.co_filename.startswith(skipped):
            frame = frame.f_back
            continue
        place = Place(frame)
        match place.statement:
            case ast.Return() if not chooses(place):
                frame = frame.f_back  # what a function returns is what its caller asks
            case ast.Assert():
                return Leaving(frame, loop=False)
            case ast.Expr(value=ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name))) if name.startswith(CHECKS):
                return Leaving(frame, loop=False)
            case ast.While() as loop if place.asks(loop):
                return Leaving(frame, loop=True)
            case ast.If() as branch if place.asks(branch) and not chooses(place):
                if leaves(branch, place.in_loop):
                    return Leaving(frame, place.in_loop)
                says = all(names_kept(statement) == set() for statement in (*branch.body, *branch.orelse))
                return Leaving(frame, loop=False) if says else None
            case ast.Assign() | ast.AnnAssign() | ast.Expr() as statement if not chooses(place):
                names = names_kept(statement)
                if names is None or (names and not (place.in_loop and only_asked(names, place.path[0]))):
                    return None
                return Leaving(frame, loop=bool(names))  # without names it is printed
            case _:
                return None
    return None


def keeps(frame: FrameType) -> bool:
    """Return whether a frame assigns what it asks, and chooses nothing by it there."""
    place = Place(frame)
    return isinstance(place.statement, ASSIGNMENTS) and not chooses(place)


def chooses(place: Place) -> bool:
    """Return whether the question picks one of two values inside a statement, or an entry of something."""
    choices = [node for node in place.path if isinstance(node, ast.IfExp)]
    entries = [node for node in place.path if isinstance(node, ast.Subscript) and node.slice in place.path]
    return bool(entries) or any(place.asks(choice) for choice in choices)


def leaves(branch: ast.If, in_loop: bool) -> bool:
    """Return whether one side of an `if` does nothing but leave the loop, or stop the program."""
    sides = [side for side in (branch.body, branch.orelse) if side and isinstance(side[-1], LEAVES)]
    for side in sides:
        stops = isinstance(side[-1], ast.Raise)
        if (in_loop or stops) and all(is_harmless(statement) for statement in side[:-1]):
            return True
    return False


def is_harmless(statement: ast.stmt) -> bool:
    """Return whether a statement before a `break` computes nothing: it passes, prints, or sets a flag."""
    match statement:
        case ast.Pass():
            return True
        case ast.Expr(value=ast.Constant() | ast.Call()):
            return True
        case ast.Assign(value=ast.Constant() | ast.Name(), targets=[ast.Name()]):
            return True
    return False


def only_asked(names: set[str], function: ast.AST) -> bool:
    """Return whether names that hold answers, and those that copy them, are read only in questions of leaving.

    Args:
        names: written by an assignment, or by a call such as `errors.append(float(err))`.
        function: what they stand in.
    """
    reads = [path for path in walk(function) if isinstance(path[-1], ast.Name) and isinstance(path[-1].ctx, ast.Load)]
    holders, waiting = set[str](), set(names)
    while waiting:
        holder = waiting.pop()
        holders.add(holder)
        for path in reads:
            if path[-1].id != holder or is_asked(path):  # type: ignore[attr-defined]
                continue
            statement = next(node for node in reversed(path) if isinstance(node, ast.stmt))
            more = names_kept(statement)
            if more is None or any(isinstance(node, ast.IfExp) for node in path):
                return False
            waiting |= more - holders
    return True


def names_kept(statement: ast.stmt) -> set[str] | None:
    """Return the names that a statement writes to; None where it writes to anything else."""
    match statement:
        case ast.Assign(targets=targets):
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            return set(names) if len(names) == len(targets) else None
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
            return set()
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"))):
            return {name}
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name) | ast.Attribute(attr=name)))) if (
            name == "warnings" or "log" in name.lower()
        ):
            return set()
    return None


def is_asked(path: list[ast.AST]) -> bool:
    """Return whether the use of a name, at the end of a path, is in a question of leaving a loop."""
    for i, (node, below) in enumerate(pairwise(path)):
        if isinstance(node, ast.While) and below is node.test:
            return True
        if isinstance(node, ast.If) and below is node.test:
            return leaves(node, any(isinstance(above, LOOPS) for above in path[:i]))
    return False


def walk(node: ast.AST) -> list[list[ast.AST]]:
    """Return the paths from a node to all below it."""
    paths = [[node]]
    for child in ast.iter_child_nodes(node):
        paths += [[node, *path] for path in walk(child)]
    return paths


def function_of(code: CodeType) -> ast.AST | None:
    """Return the syntax tree of the function that code was compiled from; None where there is no source."""
    tree = parse(code.co_filename)
    if tree is None or code.co_name == "<module>":
        return tree
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS) and node.name == code.co_name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first == code.co_firstlineno:
                return node
    return None


@cache
def parse(filename: str) -> ast.Module | None:
    """Return the syntax tree of a source file; None where it cannot be read."""
    try:
        return ast.parse("".join(linecache.getlines(filename))) if linecache.getlines(filename) else None
    except SyntaxError:
        return None


def spans(node: ast.AST, start: tuple[int, int], end: tuple[int, int]) -> bool:
    """Return whether a node's source holds all from one place to another; columns in bytes, as Python counts them."""
    if not hasattr(node, "lineno"):
        return any(spans(child, start, end) for child in ast.iter_child_nodes(node))
    return (node.lineno, node.col_offset) <= start and end <= (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
