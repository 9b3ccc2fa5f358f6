"""PyTorch itself."""
