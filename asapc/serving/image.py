"""Writes a folder from which a container image is built: a compiled folder behind KServe's model server."""

import re
import shutil
from pathlib import Path
from string import Template

from asapc.errors import OptionError, OutputError
from asapc.loading.manifest import MANIFEST, read_manifest
from asapc.runtime.kserve import MODEL, SETTINGS
from asapc.serving.triton import MAX_BATCH, batched, write_runtime
from asapc.types.interface import Interface
from asapc.writing.folder import listed_files, output_folder

TEMPLATES = Path(__file__).parent / "templates"
COPIES, FILLED = ("Containerfile", "requirements.in", "requirements.txt"), ("README.md", SETTINGS)
SERVE = "serve.py"
# For whoever starts it, wherever that is; the folder of a script comes first in Python's path.
START = "from pathlib import Path\n\nfrom asapc.runtime.kserve import serve\n\nserve(Path(__file__).parent)\n"


def package_image(folder: Path, target: Path, name: str, force: bool = False) -> None:
    """Write what a container image is built from: the compiled folder, its runtime, a server and its settings.

    Args:
        folder: what `asapc compile` wrote.
        target: the folder to write; whole, or not at all.
        name: of the served model.
        force: whether to replace the folder if it exists, its settings included.

    Raises:
        OptionError: a name that cannot stand in an address.
        CheckpointError: the compiled folder is not whole.
        OutputError: the target exists and `force` is not given, holds what asapc did not write, or cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise OptionError(f"a model cannot be called {name!r}", "give --name of letters, digits and . _ -")
    interface = Interface.of(read_manifest(folder))
    most = (interface.range_of(interface.inputs[0].shape[0]).high or MAX_BATCH) if batched(interface) else 1
    # Images are named in lower case, and begin and end with a letter or digit.
    values = {"name": name, "batch": most, "tag": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"}
    with output_folder(target, force, check_image) as partial:
        shutil.copytree(folder, partial / MODEL)
        write_runtime(partial)
        (partial / SERVE).write_text(START)
        for copy in COPIES:
            shutil.copyfile(TEMPLATES / copy, partial / copy)
        for filled in FILLED:
            (partial / filled).write_text(Template((TEMPLATES / filled).read_text()).substitute(values))


def check_image(path: Path) -> None:
    """Raise OutputError if a folder exists that `package_image` did not write, or that holds more."""
    if not path.exists():
        return
    own = {MODEL, "asapc", SERVE, *COPIES, *FILLED}
    found = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if listed_files(path / MODEL / MANIFEST) is None or not found <= own:
        raise OutputError(f"{path} holds what asapc did not write, and is not replaced", "give another --image")
