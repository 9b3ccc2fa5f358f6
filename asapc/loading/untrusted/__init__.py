"""Looks into files before any reader does."""
