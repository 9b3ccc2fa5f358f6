"""Replaces each Sinkhorn site by its selected operator.

The operator is an ordinary module. Its call replaces the product plan @ v, or the plan where something else reads it
too; the loop before it is then dead code. Exporting the result again traces the operator into the graph, so its nodes
come from its one definition in torch, and none is built by hand.
"""

from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn
from torch._ops import OpOverloadPacket
from torch.fx import GraphModule, Node

from asapc.ops.small import SmallSinkhorn
from asapc.passes.base import GraphPass, PassResult, PostconditionError, PreconditionError
from asapc.passes.layout import Form, loosen_views, restore, score_factor, site_inputs
from asapc.types.site import DotProduct, Operand, Site

# Operators that torch's automatic casts run in float32.
WIDE = {
    getattr(torch.ops.aten, name)
    for name in (
        *("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "batch_norm", "rms_norm"),
        *("exp", "log", "log1p", "log_softmax", "logsumexp", "sum", "prod", "cumsum", "pow", "rsqrt", "reciprocal"),
        "lerp",  # not among them, but takes floats of one kind alone
    )
}
# Products of which automatic casts know the parts alone: whole, they would get floats of two kinds.
PRODUCTS = {getattr(torch.ops.aten, name) for name in ("einsum", "tensordot", "inner", "linalg_multi_dot", "bilinear")}
ASSERTION = torch.ops.aten._assert_tensor_metadata.default  # what torch.export leaves behind at casts
SITE_MARK = "asapc:"  # in the scopes that torch keeps for a node: what follows is the name of the site


class InLayout(nn.Module):
    """An operator that reads and returns tensors in the layout of a graph.

    Products with queries, keys and values are in `precision`, all else in the precision of the scores: half-precision
    floats do not hold duals, scaling vectors and exponentials.
    """

    def __init__(self, site: Site, operator: nn.Module, dtype: torch.dtype, precision: torch.dtype) -> None:
        super().__init__()
        self.site, self.operator, self.dtype = site, operator, dtype
        self.form = form_of(site, operator)
        factors, dtype_of_scores = multiplied(site, self.form), site.wiring.dtype
        self.dtypes = [precision if operand in factors else dtype_of_scores for operand in site.wiring.operands]
        self.register_buffer("factor", score_factor(site, dtype_of_scores, self.form))

    factor: Tensor | None

    def forward(self, *tensors: Tensor) -> Tensor:
        """Compute the value of the node that is replaced from the values of `Wiring.operands`."""
        if not torch.is_autocast_enabled("cpu"):
            return self.run(tensors)
        with torch.autocast("cpu", enabled=False):
            return self.run(tensors)

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        """Run `forward` without automatic casts."""
        site, wiring = self.site, self.site.wiring
        inputs = [t if t.dtype == dtype else t.to(dtype) for t, dtype in zip(tensors, self.dtypes, strict=True)]
        scores, *others, live = site_inputs(site, inputs, self.factor, self.form)
        methods = {"scores": "forward", "turned": "oriented", "points": "from_points", "kernel": "from_kernel"}
        run: Callable[..., Tensor] = getattr(self.operator, methods[self.form])
        result = run(scores, *others, live) if self.form == "points" else run(scores.to(site.wiring.dtype), *others)
        result = result if result.dtype == self.dtype else result.to(self.dtype)
        last_two = "nm" if wiring.attention is None else "ne"
        return restore(result, wiring.result.axes, last_two, wiring.groups, site.loop.merged_heads)


def form_of(site: Site, operator: nn.Module) -> Form:
    """Return what form of the scores an operator reads."""
    if getattr(operator, "lowering", None) == "fused":
        return "points"
    if isinstance(operator, SmallSinkhorn) and site.wiring.exponential and site.wiring.product is None:
        # Else the logarithm of what is there would be taken, only to be undone.
        plain = operator.guard is not None and operator.guard.kernel == "plain"
        return "kernel" if plain and score_factor(site, site.wiring.dtype) is None else "scores"
    return "turned" if site.wiring.scores_are_product and getattr(operator, "turned", False) else "scores"


def multiplied(site: Site, form: Form) -> set[Operand]:
    """Return the operands that a site's operator multiplies: values, and queries and keys if it computes the scores."""
    attention, product = site.wiring.attention, site.wiring.product
    operands = set() if attention is None else {attention.value}
    if product is not None and (product.is_scores or form == "points"):
        operands |= {product.query, product.key}
    return operands


def operator_node(site: Site) -> str:
    """Return the name of the node that replaces a site's result, and of the operator that it calls."""
    return f"asapc_{site.wiring.result.node}"


class RewriteSinkhorn(GraphPass[GraphModule]):
    """Replaces sites by operators, see `ops`, in place.

    Args:
        sites: from `find_sinkhorn`, of the program that the graph module comes from.
        operators: by the site's name; a site without one is left as it is.
        precision: of products with queries, keys and values; None for that of the scores.
    """

    def __init__(
        self, sites: Sequence[Site], operators: Mapping[str, nn.Module], precision: torch.dtype | None = None
    ) -> None:
        self.precision = precision
        self.operators = {operator_node(site): (site, operators[site.name]) for site in sites if site.name in operators}

    def requires(self, program: GraphModule) -> None:
        """Check that the graph holds every site, or its operator."""
        names = {node.name for node in program.graph.nodes}
        for target, (site, _) in self.operators.items():
            nodes = {site.wiring.result.node, *(operand.node for operand in site.wiring.operands)}
            if not (nodes <= names or hasattr(program, target)):
                raise PreconditionError(f"site {site.name} was not found in this graph")

    def call(self, program: GraphModule) -> PassResult[GraphModule]:
        """Replace the sites that have not been replaced yet."""
        nodes: dict[str, Node] = {node.name: node for node in program.graph.nodes}
        assertions = program.graph.find_nodes(op="call_function", target=ASSERTION)
        for node in assertions:
            program.graph.erase_node(node)  # they would keep loops alive, and forbid other precisions
        modified = bool(assertions)
        for target, (site, operator) in self.operators.items():
            if hasattr(program, target):
                continue
            old = nodes[site.wiring.result.node]
            precision = self.precision or site.wiring.dtype
            program.add_submodule(target, InLayout(site, operator, old.meta["val"].dtype, precision))
            with program.graph.inserting_before(old):
                args = tuple(nodes[operand.node] for operand in site.wiring.operands)
                product = site.wiring.product
                if product is not None and form_of(site, operator) == "points" and not product.is_scores:
                    args = (of_one_row(nodes, product), *args[1:])
                replacement = program.graph.call_module(target, args)
            # The exporter's notes on each node of the operator then say of which site it is.
            mark = {f"{SITE_MARK}{site.name}": (f"{SITE_MARK}{site.name}", f"{InLayout.__module__}.InLayout")}
            stack = {**old.meta.get("nn_module_stack", {}), **mark}
            replacement.meta = {**old.meta, "nn_module_stack": stack}
            old.replace_all_uses_with(replacement)
            loosen_views(replacement)
            # A later site may read this one's result.
            nodes[old.name] = replacement
            modified = True
        if modified:
            program.graph.eliminate_dead_code()
            program.delete_all_unused_submodules()
            program.recompile()
        return PassResult(program, modified)

    def ensures(self, program: GraphModule) -> None:
        """Check that the graph is sound, and no site with an operator is left."""
        program.graph.lint()
        names = {node.name for node in program.graph.nodes}
        for site, _ in self.operators.values():
            if site.wiring.result.node in names:
                raise PostconditionError(f"site {site.name} is still in the graph")


def of_one_row(nodes: Mapping[str, Node], product: DotProduct) -> Node:
    """Insert into a graph, at its insertion point, the row of a site's scores that belongs to a zero query.

    Only for products whose path to the scores is padding.
    """
    first, *rest = (nodes[name] for name in product.padding or ())
    query, graph = nodes[product.query.node], first.graph
    row = graph.call_function(torch.ops.aten.slice.Tensor, (query, product.query.axes.index("n"), 0, 1))
    copies = {query: graph.call_function(torch.ops.aten.zeros_like.default, (row,))}
    copies[first] = graph.node_copy(first, lambda n: copies.get(n, n))
    for node in rest:
        copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    for node in copies.values():
        node.meta = {}
    return copies[rest[-1]]


def keep_float32(program: GraphModule) -> None:
    """Cast what goes into normalisations, exponentials and sums back to the floats that it was traced as.

    Torch's automatic casts for GPUs do so; the graph was traced with those for CPUs instead.
    """
    cast_operands(program, WIDE, None)


def narrow_products(program: GraphModule, precision: torch.dtype) -> None:
    """Cast the factors of products to a precision where automatic casts would not."""
    cast_operands(program, PRODUCTS, precision)


def cast_operands(program: GraphModule, packets: Set[OpOverloadPacket], dtype: torch.dtype | None) -> None:
    """Cast the floats that operators read to a type, None for that which each was traced as."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "overloadpacket", None) in packets:
            for source in node.all_input_nodes:
                value = source.meta.get("val")
                if isinstance(value, Tensor) and value.is_floating_point():
                    with program.graph.inserting_before(node):
                        cast = program.graph.call_function(torch.ops.aten.to.dtype, (source, dtype or value.dtype))
                    node.replace_input_with(source, cast)
    program.recompile()


def keep_output_types(program: GraphModule) -> None:
    """Cast the outputs of a graph to the floats that they were traced as, whatever precision computes them."""
    graph = program.graph
    output = graph.output_node()
    for node in output.all_input_nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point() and node.op != "placeholder":
            with graph.inserting_before(output):
                cast = graph.call_function(torch.ops.aten.to.dtype, (node, value.dtype))
            output.replace_input_with(node, cast)
    program.recompile()
