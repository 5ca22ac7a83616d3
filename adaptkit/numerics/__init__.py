"""Numerical code: takes and returns arrays or tensors, without paths, JSON, environment variables or logging."""
