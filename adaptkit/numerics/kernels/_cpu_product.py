"""Four rows of a product B A for a tile of columns, with all sums in registers; ``_llvm_product`` writes it."""

from adaptkit.compiled import written

ROWS = 4
"""Rows that share one reading of A."""

VECTORS = 2
"""Vectors of columns at a time; with four rows that makes eight sums, enough to hide how long an addition takes."""

STEP = VECTORS * 16
"""Columns at a time, at most."""

multiply = written("adaptkit.numerics.kernels._llvm_product", "multiply")
