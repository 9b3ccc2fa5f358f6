"""Archives of torch.export."""
