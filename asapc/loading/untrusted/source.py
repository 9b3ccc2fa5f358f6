"""A file to read: what messages call it, and how a reader refuses it."""

import errno
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Self

from asapc.errors import AsapcError, CheckpointError, OptionError, SamplesError
from asapc.hashes import sha256

Refusal = type[CheckpointError] | type[SamplesError] | type[OptionError]
DAMAGED = "it is damaged, or of another format"
RUNS_CODE = "would run code when loaded"
INTACT = "give an intact copy of the file"
LFS_POINTER = b"version https://git-lfs.github.com/"  # how the text begins that stands for a file kept elsewhere


@dataclass(frozen=True)
class Source:
    """A file that a stranger may have written, or a member of one that is an archive.

    Attributes:
        path: the file.
        error: class of the errors that refuse it.
        label: what messages call it.
        size: bytes.
    """

    path: Path
    error: Refusal
    label: str
    size: int

    @classmethod
    def at(cls, path: Path, error: Refusal) -> Self:
        """Check that a path leads to a regular file that is not empty; follow links.

        Raises:
            AsapcError: of class `error`. There is no such file, it is not a regular file (reading a pipe may never
                end), it is empty, or it may not be read.
        """
        source = cls(path, error, str(path), 0)
        try:
            status = path.stat()
            if S_ISDIR(status.st_mode):
                raise source.refuse("it is a folder")
            if not S_ISREG(status.st_mode):
                raise source.refuse("it is not a regular file", "give a file, not a pipe or a device")
            with path.open("rb") as file:
                start = file.read(len(LFS_POINTER))
        except FileNotFoundError:
            raise source.refuse("no such file", "check the path") from None
        except (OSError, ValueError) as failure:  # ValueError: a path with a zero byte
            raise source.refuse(reason(failure), "check the path") from None
        if status.st_size == 0:
            raise source.refuse("it is empty")
        if start == LFS_POINTER:
            raise source.refuse("it is a pointer of Git LFS, not the file itself", "fetch the file: git lfs pull")
        return replace(source, size=status.st_size)

    def __str__(self) -> str:
        """Return the label."""
        return self.label

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole file, computed when first asked for."""
        return sha256(self.path)

    def member(self, name: str, size: int) -> Self:
        """Return a member of an archive, with a label of its own."""
        return replace(self, label=f"{name} in {self.label}", size=size)

    def refuse(self, why: str = DAMAGED, hint: str = INTACT) -> AsapcError:
        """Return the error that says why the source cannot be read."""
        return self.error(f"cannot read {self}: {why}", hint)

    def would_run(self, name: object = None) -> AsapcError:
        """Return the error for a pickle that could run code; `name` is what it would call."""
        callee = f" ({str(name).replace(' ', '.')[:80]})" if name else ""
        hint = "save tensors only: model.state_dict(), not the model"
        if self.error is SamplesError:
            hint = "save arrays of numbers by input name, with numpy.savez or torch.save"
        return self.error(f"{self} holds Python objects that {RUNS_CODE}{callee}; nothing was run", hint)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn whatever a reader raises into one refusal; readers raise what the damage happens to trigger."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old formats; the refusal says all there is to say
                yield
        except AsapcError:
            raise
        except pickle.UnpicklingError as failure:
            if "Unsupported" in str(failure) or "GLOBAL" in str(failure):
                raise self.would_run() from None
            raise self.refuse() from None
        except MemoryError:
            raise self.refuse("it claims more memory than there is") from None
        except Exception:
            raise self.refuse() from None


def reason(failure: OSError | ValueError) -> str:
    """Return why a file could not be opened."""
    if isinstance(failure, OSError) and failure.errno == errno.EACCES:
        return "no permission"
    return str(getattr(failure, "strerror", None) or failure).lower()
