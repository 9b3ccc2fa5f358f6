"""How fast: rounds in which all take turns, blocks of fresh sessions, ratios with intervals, and the gate on them."""
