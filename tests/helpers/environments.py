"""Virtual environments for servers, whose packages do not go with those of the tests."""

import subprocess
import sys
import urllib.request
from hashlib import sha256
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.paths import ROOT


def environment(name: str, *arguments: str) -> Path:
    """An environment beside the checkout's files, made once by pip with these arguments, which takes a minute or two.

    It is made anew when they change, or a file that they name. The test is skipped if there is no index to ask.
    """
    folder = ROOT / name
    done = folder / "installed"
    files = [path.read_bytes() for path in map(Path, arguments) if path.is_file()]
    key = sha256(repr((arguments, files)).encode()).hexdigest()
    with FileLock(f"{folder}.lock"):
        if done.exists() and done.read_text() == key:
            return folder
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *arguments]
        result = subprocess.run(pip, check=False, capture_output=True, text=True)
        if result.returncode and not online():
            pytest.skip("there is no network to install a server from")
        assert result.returncode == 0, result.stderr
        done.write_text(key)
    return folder


def online() -> bool:
    """Whether the package index answers."""
    try:
        urllib.request.urlopen("https://pypi.org/simple/pip/", timeout=10)
    except OSError:
        return False
    return True
