"""Kinds of steps: one file each, whose name is the key that asks for it in a recipe."""
