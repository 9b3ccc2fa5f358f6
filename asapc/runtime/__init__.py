"""Runs what `asapc compile` wrote, without torch."""
