"""Looks through the opcodes of pickles, without executing any."""

import pickletools
from typing import Any

from asapc.errors import AsapcError
from asapc.loading.untrusted.source import Source

# The pickle of a checkpoint of a thousand tensors takes 100 kB.
MAX_PICKLE_BYTES = 2**25
# Elements of a tuple with all that is nested in it. Python hashes nested tuples without checking its stack: one of a
# million levels crashes it, and one that holds itself a hundred times over keeps it busy forever.
MAX_TUPLE_ELEMENTS = 1000
NAMED = -1  # on the stack, for what is looked up by name: a class or function that all of the process shares


def check_pickle(stream: Any, source: Source) -> None:
    """Look through the opcodes of one pickle, without executing any.

    Args:
        stream: binary file, at the start of the pickle; afterwards behind it.
        source: the same, for messages.

    Raises:
        AsapcError: of the source's class. The pickle changes what it names, has tuples that Python could not hash, or
            asks for memory that it does not fill.
    """
    try:
        scan(stream, source)
    except AsapcError:
        raise
    except Exception:  # genops, or a stack that runs empty: this is not a pickle
        raise source.refuse() from None


def scan(stream: Any, source: Source) -> None:
    """Check as `check_pickle` does, but raise whatever the damage happens to trigger."""
    stack: list[int] = []  # for each value the elements of a tuple, 1 for all else; 0 for a mark, or NAMED
    memo: dict[int, int] = {}
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        match opcode.name:
            case "INST" | "OBJ" | "EXT1" | "EXT2" | "EXT4":
                raise source.would_run(argument)
            case "GLOBAL" | "STACK_GLOBAL":
                pop(stack, [item.name for item in opcode.stack_before])
                stack.append(NAMED)
            case "BUILD" if stack[-2] == NAMED:
                raise source.would_run()
            case "DUP":
                stack.append(stack[-1])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                if argument > count:  # Python makes room for all numbers up to it
                    raise source.refuse()
                memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name:
                parts = pop(stack, [item.name for item in opcode.stack_before])
                elements = 1 + sum(map(abs, parts)) if name.startswith("TUPLE") else 1
                if elements > MAX_TUPLE_ELEMENTS:
                    raise source.refuse("it nests tuples too deeply")
                stack += [0 if item.name == "mark" else elements for item in opcode.stack_after]


def pop(stack: list[int], before: list[str]) -> list[int]:
    """Pop from a stack what an opcode pops, and return it; `before` is the opcode's own description of that."""
    parts = []
    if "mark" in before:
        while (part := stack.pop()) != 0:
            parts.append(part)
        before = before[: before.index("mark")]
    return parts + [stack.pop() for _ in before]
