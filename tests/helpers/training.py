"""Trainings that take a second."""

from asapc.events import StageAdvanced
from asapc.training.recipe import Recipe

SMALL = {"width": 8, "depth": 1, "heads": 2}
TINY = Recipe("digits", steps=7, batch=8, iterations=2, model=SMALL)
TINY_FILE = """
task = "digits"
steps = 7
batch = 8
iterations = 2

[model]
width = 8
depth = 1
heads = 2
"""


class Killed(Exception):
    """What ends a training in place of a signal."""


def killed_at(step: int):
    """A callback that ends a training after some step."""

    def on_event(event):
        if isinstance(event, StageAdvanced) and event.detail.startswith(f"step {step}/"):
            raise Killed

    return on_event
