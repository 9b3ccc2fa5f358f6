"""What a pass is: a checked step from one program to the next.

After onnx-ir's pass infrastructure: `requires` is checked on the input, `ensures` on the result.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from asapc.errors import InternalError

Program = TypeVar("Program")


class PreconditionError(InternalError):
    """The program does not meet what a pass requires."""


class PostconditionError(InternalError):
    """The program that a pass returned does not meet what the pass ensures."""


@dataclass(frozen=True)
class PassResult(Generic[Program]):
    """The program after a pass, and whether it differs from the one before, computed and not promised."""

    program: Program
    modified: bool


class GraphPass(ABC, Generic[Program]):
    """A step from program to program. Call the pass itself; subclasses write `call`."""

    def __call__(self, program: Program) -> PassResult[Program]:
        """Run requires -> call -> ensures."""
        self.requires(program)
        result = self.call(program)
        self.ensures(result.program)
        return result

    def requires(self, program: Program) -> None:
        """Raise PreconditionError if the program does not meet what the pass needs."""

    @abstractmethod
    def call(self, program: Program) -> PassResult[Program]:
        """Transform the program; a second run on its own result must report modified=False."""

    def ensures(self, program: Program) -> None:
        """Raise PostconditionError if the result is not what the pass promises."""


class PassManager(GraphPass[Program]):
    """Runs passes in order; a pass itself, so that managers nest."""

    def __init__(self, passes: Sequence[GraphPass[Program]]) -> None:
        self.passes = tuple(passes)

    def call(self, program: Program) -> PassResult[Program]:
        """Run every pass on the result of the one before."""
        modified = False
        for each in self.passes:
            result = each(program)
            program, modified = result.program, modified or result.modified
        return PassResult(program, modified)
