"""Relates a captured graph to its ONNX file: which node is which value of the file, exactly."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from asapc.errors import AsapcError
from asapc.loading.onnx.call import label_of
from asapc.loading.onnx.module import OnnxModule
from asapc.loading.pt2.archive import silence
from asapc.passes.find.describe import SOURCE
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples


def check_memory(module: OnnxModule, example: Samples) -> None:
    """Run a model on shapes alone, so that one that asks for more memory than there can be is refused before it does.

    Raises:
        CheckpointError: it does.
    """
    try:
        with silence(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            module(*(mode.from_tensor(value) for value in example.inputs.values()))
    except AsapcError:
        raise
    except Exception:  # whatever else is wrong shows, and better, when the model really runs
        return


def unmark(program: ExportedProgram, example: Samples, module: OnnxModule) -> CapturedGraph:
    """Remove the marks from a program that was captured from an `OnnxModule`, and note what they say.

    Which node of the file a node is a step of goes into its metadata, which copies keep.
    """
    graph = program.graph_module.graph
    place = module.source.path.name
    labels = {name: f"{place}: {label_of(node)}" for node in module.model.graph.node for name in node.output if name}
    values: dict[str, str] = {}
    steps: list[Node] = []
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.asapc.value.default:
            result, name = node.args
            values.setdefault(result.name, name)
            for step in steps:
                step.meta.setdefault(SOURCE, labels[name])
            result.meta[SOURCE] = labels[values[result.name]]
            steps.clear()
            node.replace_all_uses_with(result)
            program.graph_signature.replace_all_uses(node.name, result.name)
            graph.erase_node(node)
        elif node.op == "call_function":
            steps.append(node)
    graph.lint()
    program.graph_module.recompile()
    return CapturedGraph(program, example, values=values)


def region_module(module: GraphModule, inputs: list[Node], body: list[Node], outputs: list[Node]) -> GraphModule:
    """Copy a part of a graph into a module of its own: from some nodes, which become its inputs, to others."""
    part = torch.fx.Graph()
    copies: dict[Node, Node] = {node: part.placeholder(f"value_{i}") for i, node in enumerate(inputs)}
    for node in body:
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in outputs))
    return GraphModule(module, part)
