"""Models with Sinkhorn attention as their users write them, with the commands that train them."""
