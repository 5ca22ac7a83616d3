"""Comparisons behind ``diff``: adapters, checkpoints, and their side files."""
