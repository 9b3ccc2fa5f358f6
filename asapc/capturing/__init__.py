"""From a loaded model to one graph."""
