"""The numbers of the range coder, see ``numerics.residual``; apart from its loops, which need a compiler."""

EXACT = 192
"""Zigzag values below this are symbols of their own."""

SYMBOLS = EXACT + 57
"""The others are told by their number of bits, 8 to 64."""

PRECISION = 12
"""Frequencies add up to two to this power."""

LEAST = 1 << 16
"""A state is at least this, and less than 2^32."""

STATES = 4
"""Every so many symbols come from the same state."""
