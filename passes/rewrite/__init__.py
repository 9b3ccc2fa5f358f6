"""Rewrites a graph of torch."""
