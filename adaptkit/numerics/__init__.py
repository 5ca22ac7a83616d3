"""Tensors in, tensors out: no paths, no JSON, no environment, no logging."""
