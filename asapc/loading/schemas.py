"""Holds content of files to the JSON schemas that asapc carries."""

import json
from functools import cache
from importlib import resources
from typing import Any


@cache
def read_schema(name: str) -> dict[str, Any]:
    """Return the schema of a name: "manifest", "report" or "costs"."""
    schema: dict[str, Any] = json.loads(resources.files("asapc.loading").joinpath(f"{name}.schema.json").read_text())
    return schema


def departure(content: Any, name: str) -> str | None:
    """Return in one line where content departs from the schema of a name; None where it keeps to it."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(read_schema(name)).iter_errors(content))
    return None if error is None else f"{error.json_path[:100]}: {error.message[:200]}"
