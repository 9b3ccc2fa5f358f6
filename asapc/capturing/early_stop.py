"""Answers the questions that a model asks of its data during capture, as if nothing had converged.

A loop that stops early, `if err < tol: break`, takes its own path for each input; a graph has one path. While
torch.export traces, such a question is answered as if the error were larger than any tolerance, so the loop runs to its
bound. A question about parameters and buffers alone is answered truthfully, and so is one that may only stop the
program, an assertion: as for the example, for which the model ran. What neither can decide (token ids,
indices, the size of the batch) is left to torch.export.

Only functions that ask are intercepted, and only then is the graph so far examined: a model that asks nothing is traced
as it would be without this module.
"""

import linecache
from collections.abc import Mapping
from operator import attrgetter
from types import FrameType
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from asapc.capturing.departures import depart
from asapc.capturing.lines import user_frame
from asapc.capturing.stops import Leaving, find_leaving, keeps
from asapc.errors import CaptureError
from asapc.loading.lines import TORCH

# The functions by which a value leaves the graph as an array: to be kept or printed, since nothing brings it back.
LEAVING: set[Any] = {Tensor.numpy, Tensor.__array__}
# All functions by which a value leaves the graph and may decide what the code does next.
QUESTIONS = {
    *LEAVING,
    *(Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__),
    *(Tensor.allclose, torch.allclose, Tensor.equal, torch.equal, Tensor.is_nonzero, torch.is_nonzero),
    Tensor.__format__,
}
# `tensor.data` leaves the graph too, and torch.export fails on it; `tensor.detach()` is equivalent and stays inside.
DATA = Tensor.data.__get__  # type: ignore[attr-defined]
# Answers to one line within one call of a forward: three times the iterations of any loop that can be recognised,
# since a forward may hold several. A loop without a bound is refused only after this many, all of which are traced.
MAX_ANSWERS = 300
# Stand-ins for a Python number: beyond any tolerance, finite, and alternating, since a loop may compare an error with
# the one before.
LARGE = (2.0**1000, 2.0**1001)


class Undecided(Exception):
    """Neither constants nor the assumption that nothing has converged answer a question."""


class Unconverged(TorchFunctionMode):
    """Answers, while active, what a traced module asks of its data, as if nothing had converged.

    Args:
        module: the model.
        inputs: the example that it is traced with.

    Attributes:
        questions: the lines of code that got such an answer, by their "file:line".
        departures: where values left the graph as arrays, as "file:line".
    """

    def __init__(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module, self.constants, self.inputs = module, named_tensors(module), inputs
        self.questions: dict[str, str] = {}
        self.departures: list[str] = []
        self.answers = 0
        self.loops: dict[str, dict[FrameType, int]] = {}  # answers by line, and by the code that is left
        self.trace: Trace | None = None
        self.example: Trace | None = None  # the same graph with the values of the example

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer a question; do anything else as without this mode."""
        kwargs = kwargs or {}
        if func == DATA and get_proxy_mode() is not None:
            return args[0].detach()
        if func in QUESTIONS and (tracing := get_proxy_mode()) is not None:
            try:
                return self.answer(tracing.tracer, func, args, kwargs)
            except (Undecided, RecursionError):
                pass
        if func is torch._assert:  # asks in code of torch, where this mode is not active
            with self:
                assert args[0], args[1]
            return None
        return func(*args, **kwargs)

    def answer(self, tracer: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Answer one question: truthfully if it is about constants, else as if nothing had converged."""
        if self.trace is None or self.trace.tracer is not tracer:
            self.trace = Trace(tracer, self.module, self.constants)
            self.example = Trace(tracer, self.module, self.constants, self.inputs)
        trace = self.trace
        trace.advance()
        inputs, options = tree_map_only(Tensor, trace.node, args), tree_map_only(Tensor, trace.node, kwargs)
        about = node_set((inputs, options))
        if not about & (trace.dependent | trace.stale):
            if about & trace.sized:
                raise Undecided  # the next batch might get another answer
            return trace.call(func, inputs, options, trace.stale)
        return self.assume(trace, func, args, inputs, options)

    def assume(self, trace: "Trace", func: Any, args: Any, inputs: Any, options: Any) -> Any:
        """Answer a question about data as if nothing had converged; `inputs` are `args` as nodes."""
        subject = args[0]
        if func in LEAVING:
            frame = user_frame()
            self.departures.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            return depart([hint(size) for size in subject.shape], self.departures[-1])
        if func is Tensor.__format__ and subject.is_floating_point():
            return format(torch.inf, *args[1:])
        if func is Tensor.item and subject.dtype != torch.bool:
            if not subject.is_floating_point():
                trace.call(torch.clone, inputs, {}, trace.stale)  # undecided, except for counts of answers
            # No question yet: the number stays in the graph as a tensor, of which the question comes later. It is a
            # copy, since a number does not change when the tensor that it came from is written to.
            return subject.clone().reshape(())
        if func is Tensor.__float__ and subject.is_floating_point():
            if self.note().loop:
                return LARGE[self.answers % 2]
            return self.of_example(func, inputs, options)
        if func in (Tensor.tolist, Tensor.__format__):
            raise Undecided
        if func in (Tensor.__int__, Tensor.__index__) and subject.dtype != torch.bool:
            raise Undecided
        answer = trace.call(func, inputs, options, trace.stale)
        return answer if self.note().loop else self.of_example(func, inputs, options)

    def of_example(self, func: Any, inputs: Any, options: Any) -> Any:
        """Answer a question truthfully for the example."""
        assert self.example is not None  # it is made with the trace
        self.example.advance()
        for node in ascend(node_set((inputs, options))):  # in order, since values of deep nodes would recurse as deep
            self.example.value(node)
        return self.example.call(func, inputs, options, self.example.stale)

    def note(self) -> Leaving:
        """Record the line of the user's code that asks, and return what it decides.

        Raises:
            CaptureError: the answer decides on more than leaving a loop, or the loop has no bound.
        """
        frame = user_frame()
        name, line = frame.f_code.co_filename, frame.f_lineno
        source = f"{name}:{line}"
        question = linecache.getline(name, line).strip() or frame.f_code.co_name
        leaving = find_leaving(frame, TORCH)
        if leaving is None:
            raise taken_out(source, question) if keeps(frame) else branches_on_data(source, question)
        self.questions[source] = question
        self.answers += 1
        if not leaving.loop:
            return leaving
        # The count restarts with each activation of the code that loops: all layers of a model may share it.
        counts = self.loops.setdefault(source, {})
        counts[leaving.frame] = counts.get(leaving.frame, 0) + 1
        if counts[leaving.frame] > MAX_ANSWERS:
            raise CaptureError(
                f"the loop at {source} has no bound, or one above {MAX_ANSWERS} iterations: {question}",
                "bound it, e.g. with `for _ in range(20)`, and test for convergence inside",
            )
        return leaving

    def check_repeated(self) -> None:
        """Raise CaptureError where a loop was left at its first question: the answer was not that of a stop."""
        for source, counts in self.loops.items():
            if max(counts.values()) < 2:
                raise branches_on_data(source, self.questions[source])


def taken_out(source: str, question: str) -> CaptureError:
    """Return the refusal of a number that code takes from a tensor and keeps: in a graph it would be the example's."""
    return CaptureError(
        f"the code at {source} takes a number out of the graph, which would be the same for all inputs: {question}",
        "keep it as a tensor, without float(), item() or bool(), or omit it in evaluation",
    )


def branches_on_data(source: str, question: str) -> CaptureError:
    """Return the refusal of a branch that a graph would take one way for all inputs."""
    return CaptureError(
        f"the code at {source} branches on data, and a graph takes one path for all inputs: {question}",
        "compute both sides and choose with torch.where, or use torch.cond; a loop may ask whether to stop, as in "
        "`if err < tol: break`",
    )


class Trace:
    """A graph during tracing, and what can be known about the values of its nodes.

    Args:
        tracer: of the graph.
        module: the model.
        constants: its parameters and buffers.
        inputs: values of the model's inputs, where they are to be known.

    Attributes:
        dependent: nodes whose values depend on the inputs.
        sized: nodes whose values depend on the size of the batch.
        stale: nodes that no longer hold their value, since it was written to through another node.
    """

    def __init__(
        self,
        tracer: Any,
        module: nn.Module,
        constants: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.tracer = tracer
        self.dependent: set[Node] = set()
        self.sized: set[Node] = set()
        self.stale: set[Node] = set()
        self.examined: set[Node] = set()
        self.opaque: set[Node] = set()  # inputs and random numbers: they depend on more than other nodes
        self.stale_reads: dict[Node, set[Node]] = {}
        self.sharing: dict[Node, list[Node]] = {}  # nodes that share memory, one list for all of them
        # Computed on demand; None is a number that depends on the inputs.
        self.values: dict[Node, Any] = {}
        for name, tensor in named_tensors(module).items():  # during tracing, these stand in for the constants
            slot = get_proxy_slot(tensor, tracer, None)
            if slot is not None and slot.proxy.node.op == "placeholder" and name in constants:
                self.values[slot.proxy.node] = constants[name]
        of_inputs = [node for node in tracer.graph.nodes if node.op == "placeholder" and node not in self.values]
        self.values |= dict(zip(of_inputs, (inputs or {}).values(), strict=False))

    def node(self, tensor: Tensor) -> Node | Tensor:
        """Return the node that computes a tensor; a real tensor is its own value."""
        slot = get_proxy_slot(tensor, self.tracer, None)
        if slot is None and isinstance(tensor, FakeTensor):
            raise Undecided
        return tensor if slot is None else slot.proxy.node

    def advance(self) -> None:
        """Examine the nodes traced since the last time."""
        for node in self.tracer.graph.nodes:
            if node not in self.examined:
                self.examined.add(node)
                self.examine(node)

    def examine(self, node: Node) -> None:
        """Determine what a new node depends on, and which nodes share its memory."""
        reads = set(node.all_input_nodes)
        if isinstance(node.meta.get("val"), SymInt | SymBool | SymFloat):
            self.sized.add(node)
            return
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if random or (node.op == "placeholder" and node not in self.values):
            self.opaque.add(node)
        if stale := reads & self.stale:
            self.stale_reads[node] = stale
        if node in self.opaque or stale or reads & self.dependent:
            self.dependent.add(node)
        if reads & self.sized:
            self.sized.add(node)
        self.follow_aliases(node)

    def follow_aliases(self, node: Node) -> None:
        """Record the nodes that a new node shares memory with, and those that it writes to."""
        for i, argument in enumerate(schema_arguments(node.target)):
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            if argument.alias_info is not None and isinstance(value, Node):
                sharing = self.sharing.setdefault(value, [value])
                if argument.alias_info.is_write:
                    self.stale.update(sharing)
                sharing.append(node)
                self.sharing[node] = sharing

    def value(self, node: Node) -> Any:
        """Return the value of a node: real, assumed, or None for a number that depends on the inputs.

        Raises:
            Undecided: it can be neither computed nor assumed.
        """
        if node not in self.values:
            self.values[node] = self.compute(node)
        return self.values[node]

    def compute(self, node: Node) -> Any:
        """Compute the value of a node from those that it reads."""
        fake = node.meta.get("val")
        if isinstance(fake, SymInt | SymBool | SymFloat):
            return hint(fake)
        if node in self.dependent and isinstance(fake, Tensor) and fake.is_floating_point():
            return None
        if node.op == "get_attr":
            return attrgetter(str(node.target))(self.tracer.root)
        if node.op != "call_function" or node in self.opaque:
            raise Undecided
        stale = self.stale_reads.get(node, set())
        value = self.call(node.target, node.args, node.kwargs, stale)
        numbers = stale or any(self.value(read) is None for read in node.all_input_nodes)
        if numbers and any(leaf.dtype != torch.bool for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
            raise Undecided  # an index, say: the assumption that nothing has converged does not determine it
        return value

    def call(self, func: Any, args: Any, kwargs: Any, stale: set[Node]) -> Any:
        """Call a function on the values of nodes.

        Numbers that depend on the inputs are assumed far from convergence: the first, presumably the error, is larger
        than anything, and those after it, with which it is compared, are zero.

        Raises:
            Undecided: a value is not known, or the function refuses it.
        """
        values: dict[Node, Any] = {}
        map_arg((args, kwargs), lambda node: values.setdefault(node, None))
        for node in values:
            if node not in stale:
                values[node] = self.value(node)
        with _disable_current_modes(), torch.no_grad():
            size = torch.inf
            for node in [node for node in values if values[node] is None]:
                values[node], size = stand_in(node.meta["val"], size), 0.0
            if any(a.alias_info is not None and a.alias_info.is_write for a in schema_arguments(func)):
                # Never write to real parameters.
                values = {node: v.clone() if isinstance(v, Tensor) else v for node, v in values.items()}
            try:
                return func(*map_arg(args, values.__getitem__), **map_arg(kwargs, values.__getitem__))
            except Exception as error:
                raise Undecided from error


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a module, shared ones under each of their names."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def ascend(nodes: set[Node]) -> list[Node]:
    """Return nodes and all that they are computed from, in the order of the graph."""
    ancestors, stack = set(nodes), list(nodes)
    while stack:
        more = set(stack.pop().all_input_nodes) - ancestors
        ancestors |= more
        stack += more
    return sorted(ancestors)


def node_set(values: Any) -> set[Node]:
    """Return all nodes among nested values."""
    return {value for value in tree_leaves(values) if isinstance(value, Node)}


def schema_arguments(target: Any) -> list[Any]:
    """Return the arguments of an operation as its schema describes them; none for a plain function."""
    schema = getattr(target, "_schema", None)
    return [] if schema is None else list(schema.arguments)


def hint(size: int | SymInt | SymBool | SymFloat) -> Any:
    """Return a size in the batch of the example, without specialising the graph to it."""
    value = size if isinstance(size, int) else size.node.hint
    if value is None:
        raise Undecided
    return value


def stand_in(tensor: Any, size: float) -> Tensor:
    """Return a tensor of the same shape and type filled with one number, the largest finite one for infinity.

    It is finite so that tests for NaN and infinity find nothing.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise Undecided
    number = min(size, torch.finfo(tensor.dtype).max)
    return torch.full((), number, dtype=tensor.dtype).expand([hint(n) for n in tensor.shape])
