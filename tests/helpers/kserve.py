"""A real KServe server, in an environment of its own, from the lock that images are built from."""

from pathlib import Path

from helpers.environments import environment
from helpers.paths import ROOT

LOCK = ROOT / "asapc" / "serving" / "templates" / "requirements.txt"


def server_environment() -> Path:
    """The environment, see `environment`."""
    return environment(".venv-kserve", "--require-hashes", "--requirement", str(LOCK))
