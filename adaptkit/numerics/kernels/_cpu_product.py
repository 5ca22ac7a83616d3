"""Four rows of a product B A for a tile of columns, with all sums in registers; emitted by ``_llvm_product``."""

from adaptkit.compiled import lazy_intrinsic

ROWS = 4
"""Rows computed together, for which A is read once."""

VECTORS = 2
"""Vectors of columns at a time; with four rows that makes eight sums, enough to hide the latency of an addition."""

STEP = VECTORS * 16
"""Maximum number of columns at a time."""

multiply = lazy_intrinsic("adaptkit.numerics.kernels._llvm_product", "multiply")
