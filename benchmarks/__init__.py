"""Studies that are too long for the tests; each writes JSON into benchmarks/results."""
