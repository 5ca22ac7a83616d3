"""Quantization formats: each module defines one as ``FORMAT`` and is found by its file name."""
