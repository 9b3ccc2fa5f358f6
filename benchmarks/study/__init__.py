"""The study of training with Sinkhorn and compiling, whole: `python -m benchmarks.study`."""
