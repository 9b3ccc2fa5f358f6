"""Models with Sinkhorn attention as users write them, and the training of the example checkpoint."""
