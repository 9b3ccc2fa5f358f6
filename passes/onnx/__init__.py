"""Rewrites an ONNX model."""
