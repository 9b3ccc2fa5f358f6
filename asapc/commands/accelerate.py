"""`asapc.accelerate`: operators in the place of a model's loops, in PyTorch, without exporting anything."""

from typing import Any

from torch import nn

from asapc.backends.base import RememberingRunner
from asapc.backends.eager.runner import EagerRunner
from asapc.commands.inspect import require_sites
from asapc.commands.objects import MAX_SAMPLES, read_call, silent
from asapc.commands.study import study, torch_threads
from asapc.commands.target import cost_model
from asapc.config import OPTIONS, CompileConfig
from asapc.errors import OptionError
from asapc.events import OnEvent, stage
from asapc.fidelity.budget import check_budget
from asapc.fidelity.outputs import BATCH, verify
from asapc.fidelity.sites import site_fidelity
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.cache import cache_note, cache_of
from asapc.planning.choose import choose
from asapc.planning.costs import share_of_exact
from asapc.planning.operators import operators
from asapc.types.model import LoadedModel
from asapc.writing.accelerated import Accelerated
from asapc.writing.report import selection_note

# Options about what is written or measured.
OF_FILES = ("out", "force", "samples_in_folder", "precision", "relu_activations", "output_names", "seconds")


def accelerate(
    model: nn.Module,
    /,
    samples: Any = None,
    *,
    config: CompileConfig | None = None,
    on_event: OnEvent = silent,
    max_samples: int = MAX_SAMPLES,
    **options: Any,
) -> Accelerated:
    """Return a copy of a model in PyTorch with operators in the place of its Sinkhorn loops; nothing is exported.

    Args:
        model: a module, which stays as it is.
        samples: as of `asapc.compile`.
        config: options; None for the defaults. Those about what is written or measured are refused.
        on_event: called with progress, see `asapc.events`.
        max_samples: how many to read from an iterable.
        **options: options of `CompileConfig` by their names, in place of those of `config`.

    Returns:
        A module on the model's device, with its parameters under their names, and in its mode.

    Raises:
        AsapcError: the input is at fault or the fidelity budget is missed.
    """
    call = read_call(model, samples, config, options, max_samples, on_event)
    loaded, config = call.model, call.config
    if not isinstance(loaded, LoadedModel):
        raise OptionError("asapc.accelerate takes a torch.nn.Module, not a path", "load the model, or asapc.compile it")
    if without := [name for name in OF_FILES if getattr(config, name) != OPTIONS[name].default]:
        raise OptionError(f"asapc.accelerate writes nothing: {', '.join(without)} have no meaning", "omit them")
    costs = cost_model(config)
    with torch_threads(config.threads):
        teacher = study(loaded, config, call.gather, on_event)
        require_sites(teacher.findings, loaded.path, shows_misses=True)
        with stage("select", on_event) as step:
            cache = cache_of(config)
            selection = choose(teacher, config, costs, step.advance, cache)
            step.summary = selection_note(selection) + cache_note(cache)
        with stage("rewrite", on_event) as step:
            modules = operators(teacher.sites, selection)
            amortised = RewriteSinkhorn(teacher.sites, modules)(teacher.graph.program.module()).program
            program = RewriteSinkhorn(teacher.open_sites, modules)(teacher.open_graph.program.module()).program
            step.summary = f"{len(program.graph.nodes)} nodes"
        with stage("check", on_event) as step:
            hops = {
                "teacher": RememberingRunner(EagerRunner(loaded.module)),
                "capture": RememberingRunner(EagerRunner(teacher.graph.program.module())),
                "amortisation": RememberingRunner(EagerRunner(amortised)),
            }
            of_sites = site_fidelity(teacher.graph, teacher.sites, modules, teacher.held_out, hops["capture"])
            at_once = teacher.graph.samples_at_once(BATCH)
            fidelity = verify(hops, {}, of_sites, teacher.held_out, at_once)
            step.summary = check_budget(fidelity, config.bounds(), share_of_exact(selection)).headline
    fast = Accelerated(loaded.module, teacher.open_graph, program)
    place = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    fast = fast if place is None else fast.to(place)
    return fast.train(model.training)
