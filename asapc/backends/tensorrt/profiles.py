"""The sizes of inputs that an engine takes: from the open axes, narrowed by --profile."""

from collections.abc import Mapping

from asapc.errors import OptionError
from asapc.types.engine import Sizes
from asapc.types.graph import Axes, DynamicAxis


def open_sizes(axes: Axes, largest_batch: int) -> dict[str, dict[int, Sizes]]:
    """Return the sizes of open axes by input and number: the whole of each, and fastest where it is longest."""

    def sizes(axis: DynamicAxis) -> Sizes:
        most = axis.high or largest_batch
        return axis.low, most, most

    return {name: {number: sizes(axis) for number, axis in own.items()} for name, own in axes.items()}


def narrowed(
    profiles: Mapping[str, tuple[Sizes, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    axes: Axes,
    largest_batch: int,
) -> dict[str, dict[int, Sizes]]:
    """Return the sizes of open axes by input and number, as profiles ask for; axes of one name have the same.

    Args:
        profiles: sizes of all axes of some inputs, by name.
        shapes: of all inputs, by name; sizes of open axes do not count.
        axes: open axes.
        largest_batch: the largest size of a batch without a limit of its own.

    Raises:
        OptionError: a profile does not fit its input, or another profile.
    """
    by_axis: dict[str, Sizes] = {}
    for name, sizes in profiles.items():
        if name not in shapes:
            raise OptionError(f"--profile names {name!r}, no input of the model", f"inputs: {', '.join(shapes)}")
        own = axes.get(name, {})
        shown = "x".join(own[i].name if i in own else str(size) for i, size in enumerate(shapes[name]))
        if len(sizes) != len(shapes[name]):
            raise OptionError(
                f"--profile gives {name} {len(sizes)} axes, and it has {len(shapes[name])}", f"its shape is {shown}"
            )
        for number, (low, best, high) in enumerate(sizes):
            axis, at = own.get(number), f"axis {number} of {name}"
            given = f"{low}:{best}:{high}"
            if axis is None:
                if {low, best, high} != {shapes[name][number]}:
                    raise OptionError(
                        f"--profile gives {at} {given}, and it is fixed at {shapes[name][number]}",
                        f"open it with --dynamic, or give {shapes[name][number]} three times",
                    )
            elif low < axis.low or (axis.high is not None and high > axis.high):
                limits = f"from {axis.low}" + ("" if axis.high is None else f" to {axis.high}")
                raise OptionError(
                    f"--profile gives {at} {given}, and it goes {limits}",
                    f"stay within, or change {axis.name} of --dynamic",
                )
            elif by_axis.setdefault(axis.name, (low, best, high)) != (low, best, high):
                raise OptionError(
                    f"--profile gives {at} {given}, and elsewhere {axis.name} has "
                    f"{':'.join(map(str, by_axis[axis.name]))}",
                    "give axes of one name the same sizes",
                )
    whole = open_sizes(axes, largest_batch)
    return {
        name: {number: by_axis.get(axis.name, whole[name][number]) for number, axis in own.items()}
        for name, own in axes.items()
    }
