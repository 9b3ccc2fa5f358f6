"""Checks what a graph of a torch.export archive may hold: operators, symbolic sizes, structures of inputs."""

import ast
import re

import torch

from asapc.loading.untrusted.texts import parse_json

FORBIDDEN_OPERATORS = {"aten::from_file"}  # reads and writes files
HIGHER_ORDER = {"wrap_with_set_grad_enabled", "wrap_with_autocast", "cond"}
PLAIN_OPERATORS = {
    *(f"_operator.{name}" for name in ("getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg")),
    *(f"_operator.{name}" for name in ("pos", "eq", "ne", "le", "ge", "lt", "gt", "and_", "or_", "lshift", "rshift")),
    *(f"math.{name}" for name in ("trunc", "floor", "ceil")),
    *(f"torch.sym_{name}" for name in ("int", "float", "max", "min", "not", "ite", "sqrt")),
}
# torch writes sizes as calls of these: Mul(Integer(4), Symbol('s0', positive=True, integer=True)).
SIZE_FUNCTIONS = re.compile(
    "Integer|Rational|Add|Mul|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|Identity|Equality|"
    "Unequality|LessThan|StrictLessThan|GreaterThan|StrictGreaterThan|Eq|Ne|Le|Lt|Ge|Gt|And|Or|Not|IntTrueDiv|"
    "FloatTrueDiv|ToFloat|TruncToInt|CeilToInt|FloorToInt"
)
SYMBOL = re.compile(r"[a-z]{1,4}\d{1,5}")
MAX_EXPRESSION = 1000
TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
KEY = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def check_operator(name: str) -> bool:
    """Return whether the target of a node is an operator of tensors or sizes, and nothing else that torch can reach."""
    if name in PLAIN_OPERATORS:
        return True
    if match := re.fullmatch(r"torch\.ops\.higher_order\.(\w+)", name):
        return match[1] in HIGHER_ORDER
    match = re.fullmatch(r"torch\.ops\.(aten|prims)\.(\w+)\.(\w+)", name)
    if match is None:
        return False
    operator = getattr(getattr(getattr(torch.ops, match[1]), match[2], None), match[3], None)
    # Operators of TorchScript, some of which write files, have no kernel.
    return (
        isinstance(operator, torch._ops.OpOverload)
        and operator._schema.name not in FORBIDDEN_OPERATORS
        and torch._C._dispatch_has_kernel(str(operator._name))
    )


def check_expression(text: str) -> bool:
    """Return whether a symbolic size is arithmetic of symbols and numbers, quick to evaluate: torch evaluates it."""
    if len(text) > MAX_EXPRESSION:
        return False
    try:
        return check_size(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def check_size(node: ast.expr) -> bool:
    """Check one node as `check_expression` does."""
    match node:
        case ast.Constant(value=int() | float()):
            return True
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return check_size(operand)
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str() as name)], keywords=keywords):
            return bool(SYMBOL.fullmatch(name)) and all(map(check_keyword, keywords))
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str() as digits)], keywords=keywords):
            return bool(re.fullmatch(r"-?[\d.]{1,30}(e[+-]?\d{1,3})?", digits)) and all(map(check_keyword, keywords))
        case ast.Call(func=ast.Name(id="Pow" | "PowByNatural"), args=[base, exponent], keywords=[]):
            # A small power of a symbol only: 9**9**9 takes forever.
            small = re.fullmatch(r"Integer\(-?\d\)|-?\d", ast.unparse(exponent))
            return small is not None and ast.unparse(base).startswith("Symbol(") and check_size(base)
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]):
            return bool(SIZE_FUNCTIONS.fullmatch(name)) and all(map(check_size, parts))
    return False


def check_keyword(keyword: ast.keyword) -> bool:
    """Check a keyword argument as `check_size` does: an assumption about a symbol, or the precision of a number."""
    return isinstance(keyword.value, ast.Constant) and keyword.value.value in (True, False, *range(100))


def check_tree(text: str) -> bool:
    """Return whether a structure of inputs or outputs is of tuples, lists and dicts; others import what they name."""
    try:
        version, tree = parse_json(text)
        return bool(version == 1) and check_branch(tree)
    except (ValueError, TypeError, KeyError):
        return False


def check_branch(tree: dict[str, object]) -> bool:
    """Check one branch as `check_tree` does."""
    kind, context, children = tree["type"], tree["context"], tree["children_spec"]
    keys = parse_json(context) if isinstance(context, str) else context
    return (
        (kind is None or kind in TREES)
        and (keys is None or (isinstance(keys, list) and all(isinstance(k, str) and KEY.fullmatch(k) for k in keys)))
        and isinstance(children, list)
        and all(check_branch(child) for child in children)
    )
