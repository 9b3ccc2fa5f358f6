"""How open axes of the inputs are written."""

import re

from asapc.errors import OptionError

FORM = "use batch=1:64, seq=16:2048 for the second axis of every input, or INPUT.AXIS=LOW:HIGH, separated by commas"


def parse_ranges(text: str) -> list[tuple[str, int, int]]:
    """Return the name, the least and the largest length of each axis of a description such as "batch=1:64,seq=16:2048".

    Raises:
        OptionError: it is not of that form.
    """
    ranges = []
    for term in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*([^\s=]{1,80})=(\d{1,9}):(\d{1,9})\s*", term)
        if match is None:
            raise OptionError(f"cannot read the dynamic axis {term[:200]!r}", FORM)
        ranges.append((match[1], int(match[2]), int(match[3])))
    return ranges
