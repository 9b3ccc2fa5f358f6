"""The operators: each a readable float64 reference beside the form that graphs are traced from."""
