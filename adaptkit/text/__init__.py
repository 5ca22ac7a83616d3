"""Conversion of rows, conversations and text to a model's tokens."""
