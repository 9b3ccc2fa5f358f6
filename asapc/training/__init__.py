"""Trains the models of asapc.models on tasks whose data asapc carries or npm packages do."""
