"""Which operator each site gets, and its fit."""
