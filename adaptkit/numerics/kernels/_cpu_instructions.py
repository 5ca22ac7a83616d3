"""Intrinsics for instructions that numpy has no function for; documented in ``_llvm_instructions``."""

from adaptkit.compiled import lazy_intrinsic

_MODULE = "adaptkit.numerics.kernels._llvm_instructions"

fma = lazy_intrinsic(_MODULE, "fma")
leading_zeros = lazy_intrinsic(_MODULE, "leading_zeros")
trailing_zeros = lazy_intrinsic(_MODULE, "trailing_zeros")
wide = lazy_intrinsic(_MODULE, "wide")
