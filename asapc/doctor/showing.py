"""Turns facts and findings into tables and sentences, for terminals of 80 columns."""

from collections.abc import Iterator

from asapc.doctor import Examination
from asapc.doctor.facts import Facts, Module
from asapc.doctor.rules import GIBIBYTE
from asapc.showing import Grid, Row

NAMES = {
    "torch": "torch",
    "onnx": "onnx",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT-RTX",
    "cuda.bindings": "cuda-bindings",
}
PROVIDER = "ExecutionProvider"


def examination(found: Examination) -> Iterator[Grid | str]:
    """Show what was found, what is wrong with the commands that mend it, and whether asapc can compile here."""
    facts = found.facts
    software: list[Row] = [("asapc", facts.asapc), ("Python", f"{facts.python}, {facts.executable}")]
    software += [(NAMES[name], in_words(name, module, facts)) for name, module in facts.modules.items()]
    machine: list[Row] = [("system", facts.system), ("NVIDIA driver", driver_in_words(facts))]
    machine += [("GPU", ", ".join(gpu_in_words(facts)) or "none")]
    for folder in facts.folders:
        free = "unknown" if folder.free is None else f"{folder.free / GIBIBYTE:.1f} GiB"
        machine.append((folder.use, f"{free} left in {folder.path}"))
    yield Grid("This machine", ("part", "found"), ("part", "found"), [software, machine])
    for finding in found.findings:
        yield f"{finding.severity}: {finding.message}"
        yield from (f"    {command}" for command in finding.commands)
    yield "asapc can compile here." if found.ready else "asapc cannot compile here: mend the faults above first."


def in_words(name: str, module: Module, facts: Facts) -> str:
    """Describe a module in a few words."""
    if not module.installed:
        return "not installed"
    text = module.version or "version unknown"
    if not module.works:
        return f"{text}, cannot be imported"
    match name:
        case "torch":
            cuda = module.details.get("cuda")
            return f"{text}, built " + ("without CUDA" if cuda is None else f"with CUDA {cuda}")
        case "onnxruntime":
            providers = [provider.removesuffix(PROVIDER) for provider in module.details.get("providers", ())]
            return (
                f"{text} of {', '.join(facts.runtimes) or 'unknown origin'}: {', '.join(providers) or 'no providers'}"
            )
        case "tensorrt_rtx":
            return f"{text}, for {', '.join(module.details.get('architectures', ()))}"
    return text


def driver_in_words(facts: Facts) -> str:
    """Describe the driver in a few words."""
    if facts.driver is None:
        return "none"
    cuda = "CUDA cannot be asked" if facts.driver.cuda is None else f"CUDA up to {facts.driver.cuda}"
    return f"{facts.driver.version or 'version unknown'}, {cuda}"


def gpu_in_words(facts: Facts) -> Iterator[str]:
    """Describe each GPU in a few words."""
    for gpu in facts.gpus:
        memory = "" if gpu.memory is None else f" with {gpu.memory / GIBIBYTE:.0f} GiB"
        yield f"{gpu.name} ({gpu.architecture or 'architecture unknown'}){memory}"
