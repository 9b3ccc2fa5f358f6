"""Where graphs run and what they are built into; each backend imports its runtime inside functions only."""
