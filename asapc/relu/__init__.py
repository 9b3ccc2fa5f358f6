"""ReLU networks with exponentially many pieces, and what they stand in for."""
