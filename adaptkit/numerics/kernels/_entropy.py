"""Constants of the range coder (see ``numerics.residual``), separate from its loops, which need a compiler."""

EXACT = 192
"""Zigzag values below this are coded as themselves."""

SYMBOLS = EXACT + 57
"""Number of symbols: the values below EXACT, and one for each length, 8 to 64 bits, of larger values."""

PRECISION = 12
"""The frequencies add up to 2^PRECISION."""

LEAST = 1 << 16
"""Least state; states are below 2^32."""

STATES = 4
"""Number of interleaved states; symbol i uses state i modulo STATES."""
