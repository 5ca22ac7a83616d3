"""Kinds of steps: one module each, whose name is the step's first key in a recipe."""
