"""A real Triton server, in an environment of its own: nvidia-pytriton needs an older numpy than the tests."""

import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.paths import ROOT

PACKAGES = ("nvidia-pytriton==0.7.*", "onnxruntime", "jsonschema")


def server_environment() -> Path:
    """The environment, made once a checkout, which takes a minute; the test is skipped if there is no index to ask."""
    folder = ROOT / ".venv-triton"
    done = folder / "installed"
    with FileLock(f"{folder}.lock"):
        if done.exists():
            return folder
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES]
        result = subprocess.run(pip, check=False, capture_output=True, text=True)
        if result.returncode and not online():
            pytest.skip("there is no network to install a server from")
        assert result.returncode == 0, result.stderr
        done.touch()
    return folder


def online() -> bool:
    """Whether the package index answers."""
    try:
        urllib.request.urlopen("https://pypi.org/simple/nvidia-pytriton/", timeout=10)
    except OSError:
        return False
    return True
