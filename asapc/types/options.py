"""The values that options may take."""

from typing import Literal

# What to do with a model that stops early on the calibration samples: take its loops to their bound, or refuse it.
EarlyStopRule = Literal["bound", "refuse"]
# How an operator is lowered, see `types.choices.Candidate`; "auto" takes what is cheapest for each.
Lowering = Literal["materialised", "fused"]
LoweringRule = Literal["auto", "materialised", "fused"]
# Of the products in an engine; duals, scaling vectors and exponentials are float32 in any case.
Precision = Literal["float32", "float16", "bfloat16"]
