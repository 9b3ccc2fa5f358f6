import pytest
import torch
from helpers.tolerances import FLOAT64, difference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from asapc.passes.find.products import as_product, shape_of

aten = torch.ops.aten
quick = settings(max_examples=100, deadline=None)


def node_of(target, args, value):
    """A node as torch.export leaves it, with placeholders for its tensors, and `val` on all of them."""
    graph = torch.fx.Graph()

    def placed(arg):
        if isinstance(arg, list):
            return [placed(a) for a in arg]
        if not isinstance(arg, torch.Tensor):
            return arg
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = arg
        return node

    node = graph.call_function(target, tuple(placed(arg) for arg in args))
    node.meta["val"] = value
    return node


def recompute(product, left, right):
    """The product by its own equation, axes that broadcast dropped and put back."""

    def squeezed(tensor, axes):
        kept = [size for size, letter in zip(tensor.shape, axes, strict=True) if letter != "1"]
        return tensor.reshape(kept), axes.replace("1", "")

    (left, left_axes), (right, right_axes) = squeezed(left, product.left_axes), squeezed(right, product.right_axes)
    result = torch.einsum(f"{left_axes},{right_axes}->{product.out_axes.replace('1', '')}", left, right)
    for axis, letter in enumerate(product.out_axes):
        if letter == "1":
            result = result.unsqueeze(axis)
    return result


def check(target, args, left, right):
    """The product that is told is the one that torch computes."""
    value = target(*args)
    product = as_product(node_of(target, args, value))
    assert product.left.meta["val"] is left
    assert product.right.meta["val"] is right
    for axes, tensor in ((product.left_axes, left), (product.right_axes, right), (product.out_axes, value)):
        assert len(axes) == tensor.dim()
    actual = recompute(product, left, right)
    assert actual.shape == value.shape
    return product, actual, value


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


@st.composite
def leads(draw):
    """Leading shapes of two operands that broadcast against each other."""
    rank = draw(st.integers(0, 3))
    sizes = [draw(st.integers(1, 3)) for _ in range(rank)]
    left, right = ([size if draw(st.booleans()) else 1 for size in sizes] for _ in range(2))
    return left[draw(st.integers(0, rank)) :], right[draw(st.integers(0, rank)) :]


@quick
@given(leads(), st.integers(1, 4), st.integers(2, 4), st.integers(1, 4))
def test_matmul_with_everything_that_broadcasts(lead, n, inner, m):
    left, right = normal(*lead[0], n, inner), normal(*lead[1], inner, m)
    product, actual, value = check(aten.matmul.default, (left, right), left, right)
    assert difference(actual, value) < FLOAT64
    assert product.contracted == product.left_axes[-1] == product.right_axes[-2]
    assert product.left_axes[-2] in product.only("left")
    assert product.right_axes[-1] in product.only("right")
    assert not set(product.only("left")) & set(product.right_axes)


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_bmm_and_baddbmm(batch, n, inner, m):
    left, right = normal(batch, n, inner), normal(batch, inner, m)
    bmm, actual, value = check(aten.bmm.default, (left, right), left, right)
    assert difference(actual, value) < FLOAT64
    bias = normal(batch, n, m)
    added, actual, value = check(aten.baddbmm.default, (bias, left, right), left, right)
    assert difference(actual, value - bias) < FLOAT64
    axes = [(p.left_axes, p.right_axes, p.out_axes) for p in (bmm, added)]
    assert axes[0] == axes[1]


@st.composite
def equations(draw):
    """An einsum of two operands: shared, contracted and own axes in any order, and sizes for the letters."""
    shared, contracted, left, right = "bh"[: draw(st.integers(0, 2))], "d", "n", "m"
    inputs = ["".join(draw(st.permutations(shared + contracted + own))) for own in (left, right)]
    out = "".join(draw(st.permutations(shared + left + right)))
    sizes = {letter: draw(st.integers(1, 4)) for letter in "bhdnm"}
    arrow = f" -> {out}" if draw(st.booleans()) or shared else ""
    return f"{inputs[0]}, {inputs[1]}{arrow}", inputs, sizes


@quick
@given(equations())
def test_einsum_whatever_the_order_of_its_axes(case):
    equation, inputs, sizes = case
    left, right = (normal(*(sizes[letter] for letter in axes)) for axes in inputs)
    product, actual, value = check(aten.einsum.default, (equation, [left, right]), left, right)
    assert difference(actual, value) < FLOAT64
    assert (product.contracted, product.only("left"), product.only("right")) == ("d", "n", "m")


@pytest.mark.parametrize("one", ["left", "right"])
def test_an_einsum_that_broadcasts_an_axis_of_one_says_so(one):
    left, right = normal(1 if one == "left" else 3, 2, 4, 5), normal(3 if one == "left" else 1, 2, 6, 5)
    product, actual, value = check(aten.einsum.default, ("bhnd,bhmd->bhnm", [left, right]), left, right)
    assert difference(actual, value) < FLOAT64
    assert getattr(product, f"{one}_axes")[0] == "1"


def test_axes_of_length_one_in_both_are_no_obstacle():
    left, right = normal(1, 1, 2, 3), normal(1, 1, 3, 2)
    product, actual, value = check(aten.matmul.default, (left, right), left, right)
    assert difference(actual, value) < FLOAT64
    assert product.out_axes.startswith("11")


a, b, vector = torch.randn(2, 3, 3), torch.randn(2, 3, 3), torch.randn(3)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.add.Tensor, (a, b)),
        (aten.mul.Tensor, (a, b)),
        (aten.matmul.default, (a, vector)),
        (aten.matmul.default, (vector, a)),
        (aten.einsum.default, ("bij,bjk,bkl->bil", [a, b, a])),
        (aten.einsum.default, ("bij->bji", [a])),
        (aten.einsum.default, ("...ij,...jk->...ik", [a, b])),
        (aten.einsum.default, ("bii,bij->bj", [a, b])),
    ],
)
def test_what_is_no_product_of_two_matrices_is_none(target, args):
    assert as_product(node_of(target, args, target(*args))) is None


def test_the_product_of_a_real_export_has_a_symbolic_batch():
    class Scores(nn.Module):
        def forward(self, q, k):
            return q @ k.transpose(-1, -2)

    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Scores(), (torch.randn(2, 4, 5, 3), torch.randn(2, 1, 6, 3)), dynamic_shapes=({0: batch}, {0: batch})
    )
    [product] = [match for node in program.graph.nodes if (match := as_product(node)) is not None]
    assert (product.left_axes[0], product.right_axes[0]) == ("a", "a")
    assert product.right_axes[1] == "1"
    assert shape_of(product.left)[1:] == ("4", "5", "3")
