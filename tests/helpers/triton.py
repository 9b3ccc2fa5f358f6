"""A real Triton server, in an environment of its own: nvidia-pytriton needs an older numpy than the tests."""

from pathlib import Path

from helpers.environments import environment


def server_environment() -> Path:
    """The environment, see `environment`."""
    return environment(".venv-triton", "nvidia-pytriton==0.7.*", "onnxruntime", "jsonschema")
