"""What all processes but the first do where torchrun started several."""

from pathlib import Path

from asapc.capturing.capture import capture
from asapc.commands.teacher import find
from asapc.config import CompileConfig
from asapc.loading.model import load_model
from asapc.loading.split import gather_samples
from asapc.passes.find.build import build_plans
from asapc.planning.propose import propose


def share_calibration(path: str | Path, config: CompileConfig) -> None:
    """What all processes but the first do where torchrun started several: see, fit, and leave the rest to the first.

    Raises:
        AsapcError: as of `compile_model`.
    """
    loaded = load_model(path, config)
    calibration, _ = gather_samples(loaded, config)
    graph = build_plans(capture(loaded, calibration, config.early_stop), calibration)
    propose(graph, find(graph, calibration).sites, calibration, config)
