"""ReLU networks with exponentially many pieces, and what they replace."""
