"""What a compilation writes: graphs, the folder, the report."""
