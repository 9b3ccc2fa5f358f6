"""The part of all processes but the first where torchrun started several."""

from pathlib import Path

from asapc.commands.study import study
from asapc.config import CompileConfig
from asapc.planning.propose import propose


def share_calibration(path: str | Path, config: CompileConfig) -> None:
    """Study the model and fit a share of its samples; the first process does the rest.

    Raises:
        AsapcError: as of `compile_model`.
    """
    teacher = study(path, config)
    propose(teacher, config)
