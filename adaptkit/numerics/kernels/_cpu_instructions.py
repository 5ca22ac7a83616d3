"""Single instructions that no function of numpy stands for; ``_llvm_instructions`` says what each does."""

from adaptkit.compiled import written

_MODULE = "adaptkit.numerics.kernels._llvm_instructions"

fma = written(_MODULE, "fma")
leading_zeros = written(_MODULE, "leading_zeros")
trailing_zeros = written(_MODULE, "trailing_zeros")
wide = written(_MODULE, "wide")
