"""What an archive of torch.export may name: symbolic sizes, operators, containers."""

import json

import pytest

from asapc.loading.pt2.allowed import check_expression, check_operator, check_tree


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s0', positive=True, integer=True)",
        "Mul(Integer(4), Symbol('s0', positive=True, integer=True))",
        "Add(Pow(Symbol('s7'), Integer(2)), Integer(-1))",
        "FloorDiv(Symbol('s0'), Integer(2))",
        "Float('0.5', precision=53)",
    ],
)
def test_symbolic_sizes_pass(text):
    assert check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "Symbol('s0').__class__",
        "Symbol('s0;x')",
        "Symbol('s0', positive=print(1))",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "Pow(Pow(Symbol('s0'), Integer(9)), Integer(9))",
        "9**9**9",
        "Float('1', precision=1000000000)",
        "Float('1e999999999')",
        "Integer('__import__')",
        "[x for x in ()]",
        "lambda: 1",
        "(" * 999,
        "-" * 999 + "1",
        "Add(" * 300 + "1" + ")" * 300,
        "",
    ],
)
def test_what_is_no_symbolic_size_does_not(text):
    assert not check_expression(text)


def test_operators_of_tensors_pass_and_nothing_else_of_torch():
    for name in ("torch.ops.aten.add.Tensor", "torch.ops.aten.sym_size.int", "_operator.getitem", "torch.sym_max"):
        assert check_operator(name), name
    for name in (
        "torch.os.system",
        "torch.load",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.save.default",
        "torch.ops.aten.__class__.mro",
        "torch.ops.load_library",
        "torch.ops.aten.add",
        "torch.ops.higher_order.triton_kernel_wrapper_mutation",
        "torch._operator.add",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "math.__loader__.exec_module",
        "builtins.eval",
        "#ns:op",
        "",
    ):
        assert not check_operator(name), name


def test_structures_of_containers_pass_and_nothing_that_imports():
    leaf = {"type": None, "context": None, "children_spec": []}

    def spec(kind: str, context: object, *children: object) -> str:
        return json.dumps([1, {"type": kind, "context": context, "children_spec": list(children)}])

    assert check_tree(spec("builtins.tuple", "null", leaf))
    assert check_tree(spec("builtins.dict", '["a", "b"]', leaf, leaf))
    enum = json.dumps([{"__enum__": True, "fqn": "os:system", "name": "x"}])
    for text in (
        spec("builtins.dict", enum, leaf),
        spec("builtins.dict", json.dumps(["a=print(1)"]), leaf),
        spec("collections.defaultdict", "{}", leaf),
        spec("builtins.tuple", "null", spec("collections.defaultdict", "{}")),
        json.dumps([2, leaf]),
        "",
        "[" * 100_000,
    ):
        assert not check_tree(text), text[:100]
