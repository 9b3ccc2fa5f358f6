"""How close a compiled model is to its teacher, and how fast."""
