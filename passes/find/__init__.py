"""Finds Sinkhorn loops in a graph."""
