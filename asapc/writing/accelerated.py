"""A model with operators in the place of its loops, as a module of torch to use, move, train and save."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_map, tree_unflatten

from asapc.errors import InputError, OptionError
from asapc.types.graph import BATCH_AXIS, CapturedGraph
from asapc.types.interface import AxisRange, Interface, TensorInfo

GRAPH = "asapc_graph"  # the child that computes the forward


class Accelerated(nn.Module):
    """A model whose forward computes operators where it had Sinkhorn loops.

    It has the model's parameters, buffers and submodules under their own names, so that state dicts pass from the one
    to the other; the operators are no part of a state dict. It takes the same arguments, any number of samples at once,
    and returns the same. What it computes is the model in evaluation mode: `train()` sets the flags of its modules and
    changes nothing else, so that dropout and the statistics of normalisations stay as in evaluation. Gradients reach
    the parameters and the inputs, through the operators, whose own coefficients stay as they were fitted until
    `operator_parameters` makes parameters of them.

    Args:
        model: a copy of the model that is this one's alone.
        graph: the model with its open axes, as it was captured.
        program: the graph's module with operators in it, which is taken apart.

    Attributes:
        interface: the shapes and dtypes that it takes, by the names of its inputs.
    """

    def __init__(self, model: nn.Module, graph: CapturedGraph, program: GraphModule) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.interface = interface_of(graph)
        self.parameters_of_forward = tuple(signature(model.forward).parameters.values())
        spec = graph.program.call_spec.out_spec
        self.outputs = tree_unflatten(range(spec.num_leaves), spec)  # the place of each output of the graph
        computation, self.places, constants = lifted(program, model)
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        self.add_module(GRAPH, computation)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns, for the arguments that its own forward takes.

        Raises:
            InputError: an argument that the model was captured without, one that is missing, or a shape or dtype that
                it was not captured with.
        """
        inputs = self.inputs(args, kwargs)
        tensors = [attribute(self, place) for place in self.places]
        outputs = getattr(self, GRAPH)(*tensors, *inputs)
        return tree_map(lambda place: outputs[place], self.outputs)

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors within arguments, in the order in which the graph takes them."""
        names = [info.name for info in self.interface.inputs]
        values, rest = dict(kwargs), list(args)
        for parameter in self.parameters_of_forward:
            if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) and rest:
                if parameter.name in values:
                    raise InputError(f"{parameter.name} is given by position and by name", "give it once")
                values[parameter.name] = rest.pop(0)
        if rest:  # of `*args`
            free = [name for name in names if name not in values]
            if len(rest) > len(free):
                raise InputError(f"{len(args)} arguments by position", f"the model takes {', '.join(names)}")
            values |= dict(zip(free, rest, strict=False))
        roots = {name.partition(".")[0] for name in names} | set(names)
        defaults = {parameter.name: parameter.default for parameter in self.parameters_of_forward}
        for name, value in values.items():
            if name not in roots and value is not None and (isinstance(value, Tensor) or value != defaults.get(name)):
                raise InputError(
                    f"the model was captured without {name}", "give samples that hold it, or leave it at its default"
                )
        lengths: dict[str, tuple[str, int]] = {}
        tensors = []
        for info in self.interface.inputs:
            tensor = find(values, info.name)
            if not isinstance(tensor, Tensor):
                raise InputError(
                    f"{info.name} is {'missing' if tensor is None else f'a {type(tensor).__name__}'}",
                    f"give a tensor, {self.interface.described(info)}",
                )
            if str(tensor.dtype) != f"torch.{info.dtype}":
                raise InputError(
                    f"{info.name} is {tensor.dtype}; the model takes {self.interface.described(info)}",
                    f"convert it: {info.name}.to(torch.{info.dtype})",
                )
            self.interface.check_shape(info, tuple(tensor.shape), lengths)
            tensors.append(tensor)
        return tensors

    def operator_parameters(self) -> list[nn.Parameter]:
        """Make parameters of the coefficients that operators were fitted with, to train them alone or with the rest.

        From then on they are among `parameters()` and, below `asapc_graph`, in state dicts.

        Returns:
            These parameters; none where all operators are exact or truncated Sinkhorn.
        """
        parameters = []
        for module in getattr(self, GRAPH).modules():
            for name in getattr(module, "coefficients", ()):
                value = getattr(module, name)
                if not isinstance(value, nn.Parameter):
                    del module._buffers[name]
                    value = nn.Parameter(value)
                    module.register_parameter(name, value)
                parameters.append(value)
        return parameters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move tensors as of any module, and what the graph makes anew to the same device.

        Raises:
            OptionError: this would change their dtype, which operators depend on.
        """
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point() and fn(tensor.new_empty(0)).dtype != tensor.dtype:
                raise OptionError(
                    f"an accelerated model stays in {tensor.dtype}, in which its operators were fitted",
                    "convert the model before it is accelerated",
                )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        place = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), None)
        if place is not None:
            put_on(getattr(self, GRAPH), place)
        return self


def interface_of(graph: CapturedGraph) -> Interface:
    """Return what a captured graph takes."""
    infos: list[TensorInfo] = []
    ranges: dict[str, AxisRange] = {}
    for name, value in graph.example.inputs.items():
        axes = {0: BATCH_AXIS} if graph.axes is None else graph.axes[name]
        ranges |= {axis.name: AxisRange(axis.low, axis.high) for axis in axes.values()}
        shape = tuple(axes[i].name if i in axes else size for i, size in enumerate(value.shape))
        infos.append(TensorInfo(name, str(value.dtype).removeprefix("torch."), shape))
    return Interface(tuple(infos), (), ranges)


def find(values: Mapping[str, Any], name: str) -> Any:
    """Return what stands under a dotted name in nested dicts and tuples, None where nothing does."""
    if name in values:
        return values[name]
    first, *rest = name.split(".")
    value = values.get(first)
    for part in rest:
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, tuple | list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def attribute(module: nn.Module, place: str) -> Any:
    """Return what a module has under a dotted name."""
    value: Any = module
    for part in place.split("."):
        value = getattr(value, part)
    return value


def lifted(program: GraphModule, model: nn.Module) -> tuple[GraphModule, tuple[str, ...], dict[str, Tensor]]:
    """Return a graph that takes tensors before its inputs, their names, and those of them that the model does not name.

    So they stand in one place only, whatever replaces them there: a move, a cast, a state dict.
    """
    graph = program.graph
    graph._tracer_cls = None  # that of torch.export cannot trace the graph anew, as loading a pickle does
    graph.set_codegen(CodeGen())  # inputs and outputs one by one, without the trees that torch.export puts around
    own = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))}
    first = graph.find_nodes(op="placeholder")[0]
    taken: dict[str, Node] = {}
    constants: dict[str, Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        value = attribute(program, target)
        if not isinstance(value, Tensor):
            continue
        if target not in taken:
            with graph.inserting_before(first):
                taken[target] = graph.placeholder(f"own_{len(taken)}")
            if target not in own:
                constants[target] = value.detach()
        node.replace_all_uses_with(taken[target])
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_module", target="_guards_fn"):
        graph.erase_node(node)  # torch's own checks of inputs
    graph.eliminate_dead_code()
    program.delete_all_unused_submodules()
    computation = GraphModule(program, graph)
    for module in computation.modules():
        module._non_persistent_buffers_set.update(module._buffers)  # operators are no part of a state dict
    names = {target: f"asapc_constant_{number}" for number, target in enumerate(constants)}
    places = tuple(names.get(target, target) for target in taken)
    return computation, places, {names[target]: value for target, value in constants.items()}


def put_on(computation: GraphModule, device: torch.device) -> None:
    """Let the nodes of a graph that make tensors make them on a device."""
    nodes = [node for node in computation.graph.nodes if node.kwargs.get("device") not in (None, device)]
    for node in nodes:
        node.kwargs = {**node.kwargs, "device": device}
    if nodes:
        computation.recompile()
