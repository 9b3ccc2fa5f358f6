"""Writes held-out samples and what the teacher returned for them, so that fidelity can be checked again without it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asapc.types.samples import Samples

MAX_HELD_OUT = 2**24  # bytes of samples and outputs, before compression


def write_held_out(path: Path, samples: Samples, outputs: Sequence[Sequence[Tensor]]) -> None:
    """Write held-out samples and what the teacher returned for them, compressed, so that both can be compared again.

    Arrays are named "input.<name>", "output.<place>" and "labels". Of large samples as many are kept as fit into
    MAX_HELD_OUT bytes. bfloat16, which numpy does not know, becomes float32.

    Args:
        path: the file.
        samples: the inputs.
        outputs: of the model, batch by batch.
    """
    tensors = {f"input.{name}": value for name, value in samples.inputs.items()}
    tensors |= {f"output.{place}": torch.cat(parts) for place, parts in enumerate(zip(*outputs, strict=True))}
    if samples.labels is not None:
        tensors["labels"] = samples.labels
    count = max(1, min(len(samples), MAX_HELD_OUT // (sum(t[:1].nbytes for t in tensors.values()) or 1)))
    kept = {name: value[:count].detach().cpu() for name, value in tensors.items()}
    arrays: dict[str, Any] = {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in kept.items()}
    np.savez_compressed(path, **arrays)
