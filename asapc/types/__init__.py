"""The data that flows between the stages: frozen, and without logic of its own."""
