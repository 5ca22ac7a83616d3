"""Quantization formats: each module defines one as ``FORMAT`` and is found by its file name.

Modules with an underscore are shared parts, and formats that are only decoded.
"""
