"""Intrinsics for single LLVM instructions; kernels import them from ``_cpu_instructions``."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_ZERO_IS_FINE = ir.Constant(ir.IntType(1), 0)


@intrinsic
def trailing_zeros(typingctx, bits):
    """Return the number of zero bits below the lowest set bit of a uint64; 64 for zero."""

    def codegen(context, builder, signature, arguments):
        return builder.cttz(arguments[0], _ZERO_IS_FINE)

    return types.uint64(types.uint64), codegen


@intrinsic
def leading_zeros(typingctx, bits):
    """Return the number of zero bits above the highest set bit of a uint64; 64 for zero."""

    def codegen(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], _ZERO_IS_FINE)

    return types.uint64(types.uint64), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """Return a · b + c, rounded once; all float32."""

    def codegen(context, builder, signature, arguments):
        number = ir.FloatType()
        kind = ir.FunctionType(number, [number] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.f32"), arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def wide(typingctx):
    """Let the compiler use 64-byte vectors in the calling function, if the processor has them.

    By default it uses 32 bytes, since the first processors with wider vectors lowered their clock for them. Loops that
    compute much per number loaded are a quarter faster with 64 bytes on later processors.
    """

    def codegen(context, builder, signature, arguments):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite knows other attributes only
        return context.get_dummy_value()

    return types.void(), codegen
