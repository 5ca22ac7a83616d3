"""Releases from a recipe: sources, steps, a lock, and a work folder that remembers what was made from what."""
