"""Captures models as one graph, by their format."""

from dataclasses import replace

from torch import ScriptObject, nn

from asapc.capturing.casts import check_uncast, without_casts
from asapc.capturing.compare import check_single, compare_stops, run
from asapc.capturing.draws import check_draws
from asapc.capturing.early_stop import Unconverged
from asapc.capturing.export import export
from asapc.capturing.names import rename_outputs
from asapc.capturing.onnx import check_memory, unmark
from asapc.errors import CaptureError, CheckpointError, SamplesError
from asapc.loading.inputs import order_inputs
from asapc.loading.onnx.module import OnnxModel
from asapc.loading.onnx.reader import EXPORT
from asapc.loading.pt2.program import ExportedModel
from asapc.types.graph import Axes, CapturedGraph
from asapc.types.model import LoadedModel
from asapc.types.options import EarlyStopRule
from asapc.types.samples import Samples

# Batch of the example. Two or more, since an example of one is made a constant without a word
# (pytorch issue 151582).
EXAMPLE_BATCH = 2


def capture_code(
    loaded: LoadedModel,
    samples: Samples,
    early_stop: EarlyStopRule = "bound",
    axes: Axes | None = None,
) -> CapturedGraph:
    """Capture a module of Python with a dynamic batch axis, without its automatic casts.

    Args:
        loaded: the model.
        samples: two samples or more, named as the parameters of its forward. A model that stops early is compared
            with its graph on all of them.
        early_stop: what to do where loops that stop early for these samples are captured at their bound, and the
            outputs differ: "bound" goes on, "refuse" does not.
        axes: open axes by the input's name and their number; None for the batch alone.

    Raises:
        OptionError: `loaded.output_names` are not as many as the outputs, or are names of inputs.
        SamplesError: the samples' names are not those of the model's inputs, or the model refuses them.
        CaptureError: the model has quantised layers or control flow that cannot be captured, returns more than tensors,
            draws random numbers that change its outputs, needs its automatic casts, differs for a batch of one, or
            stops early where `early_stop` refuses that.
    """
    check_packed(loaded.module)
    samples, example = prepare(loaded, samples)
    run(loaded.module, example, samples)
    with without_casts() as casts, Unconverged(loaded.module, example.inputs) as unconverged:
        program = export(loaded.module, example.inputs, axes)
    unconverged.check_repeated()
    check_uncast(loaded.module, example, casts)
    check_draws(program, example)
    departures = tuple(dict.fromkeys(unconverged.departures))
    check_single(loaded.module, program, example, stops=bool(unconverged.questions))
    graph = CapturedGraph(program, example, axes=axes, departures=departures, casts=tuple(casts))
    rename_outputs(graph, loaded.output_names)
    if not unconverged.questions:
        return graph
    # Values that only decided whether to stop are dead now.
    program.graph_module.graph.eliminate_dead_code()
    program.graph_module.recompile()
    stops = compare_stops(loaded.module, graph, samples, unconverged.questions)
    if stops.taken and early_stop == "refuse":
        raise CaptureError(
            f"the loop at {', '.join(stops.questions)} stops early on the samples given; taken to its bound the "
            f"outputs differ by {stops.difference:.1e}",
            "compile it with --early-stop bound, or train and evaluate it with a fixed number of iterations",
        )
    return replace(graph, early_stops=stops)


def check_packed(module: nn.Module) -> None:
    """Raise CaptureError where a model holds weights as objects of C++, as dynamically quantised layers do."""
    packed = [
        n for n, layer in module.named_modules() if any(isinstance(v, ScriptObject) for v in vars(layer).values())
    ]
    if packed:
        raise CaptureError(
            f"torch.export cannot capture quantised layers, whose weights are packed: {', '.join(packed)}",
            "compile the float model that they were made from",
        )


def capture_exported(loaded: ExportedModel, samples: Samples) -> CapturedGraph:
    """Return the graph of a torch.export archive with a dynamic batch axis alone, once the model has run on samples.

    Raises:
        OptionError: `loaded.output_names` are not as many as the outputs, or are names of inputs.
        SamplesError: the samples' names are not those of the model's inputs, or the model refuses them.
        CaptureError: the model returns more than tensors, or draws random numbers that change its outputs.
    """
    samples, example = prepare(loaded, samples)
    run(loaded.module, example, samples)
    is_fixed = all(kind.sizes is None or None not in kind.sizes[1:] for kind in loaded.inputs.values())
    # Loops are recognised at fixed lengths: axes that the archive leaves open get those of the samples.
    graph = CapturedGraph(loaded.program if is_fixed else export(loaded.module, example.inputs), example)
    check_draws(graph.program, example)
    rename_outputs(graph, loaded.output_names)
    return graph


def capture_onnx(loaded: OnnxModel, samples: Samples) -> CapturedGraph:
    """Capture the module of an ONNX file, and note which node is which value of the file.

    Raises:
        SamplesError: the samples' names are not those of the model's inputs, or the model refuses them.
        CheckpointError: the model asks for more memory than there can be.
        CaptureError: the model cannot be captured, or differs for a batch of one.
    """
    module = loaded.module
    samples, example = prepare(loaded, samples)
    check_memory(module, example)
    try:
        run(module, example, samples)
    except SamplesError as error:
        if module.batch is None:
            raise
        raise CheckpointError(f"{loaded.path} has a fixed batch of {module.batch}; opened, {error}", EXPORT) from error
    graph = unmark(export(module, example.inputs), example, module)
    check_single(module, graph.program, example)
    return graph


def prepare(loaded: LoadedModel, samples: Samples) -> tuple[Samples, Samples]:
    """Return samples in the order of the model's inputs, and those of them that it is captured with."""
    samples = order_inputs(loaded, samples)
    return samples, samples[:EXAMPLE_BATCH]
