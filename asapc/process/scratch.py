"""Temporary folders that tell whether their process lives, so that a run can remove what a killed one left behind.

Each holds a file that its process keeps locked. The system drops the lock when the process ends, however it ends.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from asapc.errors import OutputError
from asapc.process.interrupts import held

LOCK = "asapc.lock"
# What tempfile appends to a prefix.
SUFFIX = "[a-z0-9_]{8}"


@contextmanager
def scratch_folder(
    parent: Path, prefix: str, before_removal: Callable[[Path], None] = lambda folder: None
) -> Iterator[Path]:
    """Yield a new folder in `parent`; remove it at the end, and those of the same prefix whose process was killed.

    Args:
        parent: a folder.
        prefix: of its name.
        before_removal: saves from a folder, this one or a stale one, what must not be lost.

    Raises:
        OSError: `parent` cannot be written.
    """
    sweep(parent, prefix, before_removal)
    with ExitStack() as stack:
        with held():
            folder, descriptor = create(parent, prefix)
            stack.callback(remove, folder, before_removal)
            stack.callback(os.close, descriptor)  # first: Windows removes no file that is open
        yield folder


@contextmanager
def temporary_files() -> Iterator[None]:
    """Keep all temporary files of the block, those of libraries and child processes too, in a folder that goes with it.

    Raises:
        OutputError: there is no temporary folder that can be written.
    """
    before, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder(Path(tempfile.gettempdir()), "asapc."))
        except OSError as error:
            why = (error.strerror or "unknown reason").lower()
            raise OutputError(f"cannot write temporary files: {why}", "set TMPDIR to a folder with space") from None
        try:
            tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
            yield
        finally:
            tempfile.tempdir = before
            os.environ.pop("TMPDIR", None)
            os.environ.update({} if variable is None else {"TMPDIR": variable})


def sweep(parent: Path, prefix: str, before_removal: Callable[[Path], None] = lambda folder: None) -> None:
    """Remove the folders in `parent` whose process is dead."""
    try:
        names = os.listdir(parent)
    except OSError:  # there is no such folder, or it cannot be read: whoever writes there will say so
        return
    for name in names:
        if re.fullmatch(re.escape(prefix) + SUFFIX, name):
            with suppress(OSError):
                sweep_one(parent / name, before_removal)


def sweep_one(folder: Path, before_removal: Callable[[Path], None]) -> None:
    """Remove a folder if it is one of this user and its process is dead.

    Raises:
        OSError: it cannot be removed, or its process lives.
    """
    # Others may write in the same parent, as in /tmp, and put a link there.
    if folder.is_symlink() or (hasattr(os, "getuid") and folder.stat().st_uid != os.getuid()):
        return
    if not (folder / LOCK).exists():
        folder.rmdir()  # of a process killed as it began or ended; fails if it holds anything, which is not asapc's
        return
    descriptor = os.open(folder / LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        lock(descriptor)
        remove(folder, before_removal)
    finally:
        os.close(descriptor)


def create(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder with a lock, and return it with the lock's descriptor."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # Another process may sweep it away as long as it is not locked.
        with suppress(FileNotFoundError):
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            # Some file systems have no locks; folders there are never swept.
            with suppress(OSError):
                lock(descriptor)
            if os.fstat(descriptor).st_nlink:
                return folder, descriptor
            os.close(descriptor)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait for the blocks of other processes for the same folder, where the system can lock one; Windows cannot."""
    with ExitStack() as stack:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            lock(descriptor, wait=True)
        yield


def lock(descriptor: int, wait: bool = False) -> None:
    """Lock a file or folder for this process, at once or when it is free.

    Raises:
        OSError: another process holds the lock, or the system has none.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        raise OSError("this system has no flock") from None
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def remove(folder: Path, before_removal: Callable[[Path], None]) -> None:
    """Remove a folder, its lock last, so that what is left by a kill on the way is still known as asapc's."""
    with held(), suppress(OSError):
        before_removal(folder)
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
