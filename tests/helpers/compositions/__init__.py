"""Random attention models: independent choices of everything that code around a Sinkhorn loop differs in.

`CHOICES` holds the options of each choice; a `Composition` is one option of each. A poison makes the loop something
else.
"""

from .choices import CHOICES, POISONS, Composition, consistent, pick
from .families import FAMILIES, LONG
from .models import Composed, inputs_of

__all__ = [
    "CHOICES",
    "FAMILIES",
    "LONG",
    "POISONS",
    "Composed",
    "Composition",
    "consistent",
    "inputs_of",
    "pick",
]
