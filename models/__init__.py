"""Models with Sinkhorn attention as users write them, and recipes to train them by."""
