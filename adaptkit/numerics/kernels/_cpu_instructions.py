"""Intrinsics for instructions that numpy has no function for; documented in ``_llvm_instructions``."""

from adaptkit.compiled import written

_MODULE = "adaptkit.numerics.kernels._llvm_instructions"

fma = written(_MODULE, "fma")
leading_zeros = written(_MODULE, "leading_zeros")
trailing_zeros = written(_MODULE, "trailing_zeros")
wide = written(_MODULE, "wide")
