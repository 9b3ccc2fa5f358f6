"""The study of what Sinkhorn attention buys and what compiling it keeps: a module for each part of docs/study.md."""
