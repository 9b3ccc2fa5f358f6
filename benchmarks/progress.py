"""Results that are kept as they come, so that a run which was stopped goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asapc.planning.cache import code_digest
from asapc.writing.folder import write_json

CACHE = Path(__file__).resolve().parent / "cache"


class Progress:
    """What a run of a benchmark has so far, in a folder that lasts as long as the code of asapc stays the same.

    Attributes:
        folder: for other files that the next run can use.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        """Read what there is in a folder, by default one for a benchmark of that name."""
        self.folder = folder or CACHE / name / code_digest().hex()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "progress.json"
        self.data: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return a result, computed and kept where it is missing."""
        if key not in self.data:
            self.data[key] = compute()
            print(f"{key}: {self.data[key]}"[:400], flush=True)
            write_json(self.path, self.data)
        return self.data[key]

    def finish(self) -> None:
        """Forget the results, so that the next run begins anew."""
        self.path.unlink(missing_ok=True)
