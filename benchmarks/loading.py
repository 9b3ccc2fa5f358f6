"""What is read, and what is said of files that are not: writes the table of docs/loading.md.

    python -m benchmarks.loading

Run from the root of a checkout, with transformers installed.
"""

import sys
from pathlib import Path

from benchmarks.generated import replace_generated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the files are the tests' own

from helpers.formats import table  # noqa: E402

if __name__ == "__main__":
    replace_generated(ROOT / "docs" / "loading.md", table())
