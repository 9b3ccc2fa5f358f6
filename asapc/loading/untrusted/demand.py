"""Adds up what a graph asks for, before any of it is allocated: a few bytes of a file may ask for any amount."""

from asapc.errors import CheckpointError
from asapc.loading.untrusted.source import Source

# Twelve layers of a hundred half-steps have some ten thousand; torch.export takes milliseconds for each.
MAX_NODES = 2**14
# Constants that a graph computes from others, masks and positions, may take this many times its file's size, and in a
# small file this many bytes anyway.
MAX_CONSTANTS_RATIO, MAX_CONSTANTS_BYTES = 8, 2**30


class Demand:
    """What a graph has asked for so far.

    Args:
        source: its file.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.nodes = self.constants = 0

    def add_nodes(self, count: int = 1) -> None:
        """Count nodes that run; those of a loop once for each iteration.

        Raises:
            CheckpointError: there are too many.
        """
        self.nodes += count
        if self.nodes > MAX_NODES:
            raise CheckpointError(
                f"{self.source} runs more than {MAX_NODES:,} nodes", "export fewer layers, or loops of fewer iterations"
            )

    def add_constant(self, size: int) -> None:
        """Count the bytes of a value that depends on no input.

        Raises:
            CheckpointError: all together take more than the file's size warrants.
        """
        self.constants += size
        if self.constants > MAX_CONSTANTS_BYTES and self.constants > MAX_CONSTANTS_RATIO * self.source.size:
            raise CheckpointError(
                f"{self.source} computes constants of {self.constants:,} bytes and more, none of which it holds",
                "store them in the file, or compute them from the inputs",
            )
