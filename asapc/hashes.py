"""SHA-256 of files and of tensors."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the runtime hashes files, and does without torch
    from torch import Tensor


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_tensor(digest: Any, name: str, value: "Tensor") -> None:
    """Add name, dtype, shape and bytes of a tensor to a hash."""
    import torch

    digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def add_value(digest: Any, name: str, value: Any) -> None:
    """Add what stands under a name to a hash: a tensor, or anything else as Python writes it."""
    from torch import Tensor

    if isinstance(value, Tensor):
        add_tensor(digest, name, value)
    else:
        digest.update(f"{name} {value!r}\n".encode())
