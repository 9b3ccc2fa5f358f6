"""What a target decides: the costs that the planner reads."""

from pathlib import Path

import torch

from asapc.config import CompileConfig
from asapc.errors import OptionError
from asapc.loading.costs import read_costs
from asapc.planning.costs import shipped
from asapc.types.costs import CostModel, Provider
from asapc.types.options import Precision, Target

# Made by NVIDIA's driver, which ONNX Runtime finds the GPU by even where torch is built for CPUs.
FIRST_GPU = Path("/dev/nvidia0")
NAMES = {"cpu": "a CPU", "cuda": "a GPU"}


def sees_gpu() -> bool:
    """Return whether torch, or ONNX Runtime without it, could run on an NVIDIA GPU here."""
    return torch.cuda.is_available() or FIRST_GPU.exists()


def provider_of(target: Target) -> Provider:
    """Return the provider whose costs a target stands for."""
    if target == "auto":
        return "cuda" if sees_gpu() else "cpu"
    return "cpu" if target == "onnx" else "cuda"


def products_of(provider: Provider, precision: Precision) -> str:
    """Return the precision that costs are kept for: bfloat16 takes what float16 does, and a CPU runs float32 alone."""
    return "float32" if provider == "cpu" or precision == "float32" else "float16"


def cost_model(config: CompileConfig) -> CostModel:
    """Return the costs that the planner reads: those of --costs, else what asapc carries for the target.

    Raises:
        OptionError: the file of --costs cannot be used, or is about another device or precision than the options.
    """
    if config.costs is None:
        provider = provider_of(config.target)
        return shipped(provider, products_of(provider, config.precision))
    model = read_costs(Path(config.costs))
    # What runs on a machine is no reason to refuse a file that was given: only a target by name is.
    if config.target != "auto" and model.provider != provider_of(config.target):
        raise OptionError(
            f"{config.costs} has the costs of {NAMES[model.provider]}, and --target {config.target} plans for "
            f"{NAMES[provider_of(config.target)]}",
            "omit --costs or --target, or measure costs with `asapc costs --target onnx` or `--target cuda`",
        )
    if model.precision != products_of(model.provider, config.precision):
        raise OptionError(
            f"{config.costs} has the costs of {model.precision}, and --precision is {config.precision}",
            "measure costs with `asapc costs --target cuda` and this --precision, or omit --costs",
        )
    return model
