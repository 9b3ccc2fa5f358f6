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
# What a pickle may name: the parts of plain tensors and containers. Storages and dtypes follow.
GLOBALS = {
    "collections OrderedDict",
    "collections Counter",
    "_codecs encode",
    "__builtin__ set",
    "builtins set",
    "__builtin__ complex",
    "builtins complex",
    "torch Size",
    "torch device",
    "torch.storage UntypedStorage",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
}
GLOBALS |= {f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char")}
GLOBALS |= {f"torch {kind}Storage" for kind in ("Byte", "Bool", "ComplexDouble", "ComplexFloat")}
GLOBALS |= {f"torch {kind}{bits}" for kind in ("float", "int", "uint") for bits in (8, 16, 32, 64)}
GLOBALS |= {"torch bfloat16", "torch bool", "torch complex64", "torch complex128"}
GLOBALS |= {f"torch float8_{kind}" for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")}


def check_pickle(stream: Any, source: Source) -> None:
    """Look through the opcodes of one pickle, without executing any.

    Args:
        stream: binary file, at the start of the pickle; afterwards behind it.
        source: the same, for messages.

    Raises:
        AsapcError: of the source's class. The pickle names something other than the parts of tensors and containers,
            or has tuples that Python could not hash.
    """
    try:
        scan(stream, source)
    except AsapcError:
        raise
    except Exception:  # genops, or a stack that runs empty: this is not a pickle
        raise source.refuse() from None


def scan(stream: Any, source: Source) -> None:
    """Do as `check_pickle`, but raise whatever the damage happens to trigger."""
    stack: list[int] = []  # for each value the elements of a tuple, 1 for all else; 0 for a mark
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        match opcode.name:
            case "GLOBAL" if argument in GLOBALS:
                stack.append(1)
            case "GLOBAL" | "STACK_GLOBAL" | "INST" | "OBJ" | "EXT1" | "EXT2" | "EXT4":
                raise source.would_run(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument or 0] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument or 0])
            case name:
                parts = pop(stack, [item.name for item in opcode.stack_before])
                elements = 1 + sum(parts) if name.startswith("TUPLE") else 1
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
