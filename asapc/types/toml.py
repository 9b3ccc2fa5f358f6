"""Reads TOML files that may come from strangers."""

import tomllib
from pathlib import Path
from stat import S_ISREG
from typing import Any

from asapc.errors import OptionError
from asapc.types.plain import check_plain

MAX_TOML_BYTES = 2**20  # of a file of options; all of them take two thousand


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        OptionError: it is not a regular file, is too long or is not TOML, nests too deeply, or has long integers.
    """
    hint = "give a TOML file"
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            raise OptionError(f"cannot read {path}: it is not a regular file", hint)
        if status.st_size > MAX_TOML_BYTES:
            raise OptionError(f"cannot read {path}: it has {status.st_size:,} bytes", hint)
        content = tomllib.loads(path.read_text("utf-8-sig"))
        check_plain(content)
    except RecursionError:
        raise OptionError(f"cannot read {path}: it nests too deeply", hint) from None
    except FileNotFoundError:
        raise OptionError(f"cannot read {path}: no such file", "check the path") from None
    except OSError as error:
        raise OptionError(f"cannot read {path}: {(error.strerror or 'no file').lower()}", hint) from None
    except ValueError as error:  # no TOML, no text, or no path
        raise OptionError(f"cannot read {path}: {str(error)[:300]}", hint) from None
    return content
