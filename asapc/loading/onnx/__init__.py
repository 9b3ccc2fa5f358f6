"""ONNX files as models of torch."""
