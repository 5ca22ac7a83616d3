"""Evaluation of models: loss, text, generated answers, and comparisons of models."""
