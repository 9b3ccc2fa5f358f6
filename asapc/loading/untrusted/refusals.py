"""The errors for files that cannot be read, or must not be."""

from asapc.errors import AsapcError, CheckpointError, OptionError, SamplesError

Kind = type[CheckpointError] | type[SamplesError] | type[OptionError]
DAMAGED = "it is damaged, or of another format"
RUNS_CODE = "would run code when loaded"
INTACT = "give an intact copy of the file"


def unreadable(path: object, kind: Kind, why: str = DAMAGED, hint: str = INTACT) -> AsapcError:
    """The error that says why a file cannot be read."""
    return kind(f"cannot read {path}: {why}", hint)


def would_run(where: object, kind: Kind, name: object = None) -> AsapcError:
    """The error for a file whose pickle could run code."""
    named = f" ({str(name).replace(' ', '.')[:80]})" if name else ""
    samples = "save arrays of numbers by input name, with numpy.savez or torch.save"
    return kind(
        f"{where} holds Python objects that {RUNS_CODE}{named}; nothing was run",
        samples if kind is SamplesError else "save tensors only: model.state_dict(), not the model",
    )
