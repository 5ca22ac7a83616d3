"""Counting zero bits: one instruction of most processors, and LLVM's own where there is none."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_ZERO_IS_FINE = ir.Constant(ir.IntType(1), 0)


@intrinsic
def trailing_zeros(typingctx, bits):
    """How many bits of a uint64 are zero before the lowest that is not; 64 if none is."""

    def codegen(context, builder, signature, arguments):
        return builder.cttz(arguments[0], _ZERO_IS_FINE)

    return types.uint64(types.uint64), codegen


@intrinsic
def leading_zeros(typingctx, bits):
    """How many bits of a uint64 are zero above the highest that is not; 64 if none is."""

    def codegen(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], _ZERO_IS_FINE)

    return types.uint64(types.uint64), codegen
