"""Single instructions, by LLVM's names for them; ``_cpu_instructions`` has them for kernels."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from llvmlite import ir
from numba import types
from numba.core import cgutils
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


@intrinsic
def fma(typingctx, a, b, c):
    """A · b + c, rounded once."""

    def codegen(context, builder, signature, arguments):
        number = ir.FloatType()
        kind = ir.FunctionType(number, [number] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.f32"), arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def wide(typingctx):
    """Let the function that calls this have vectors of 64 bytes where there are any.

    The compiler takes half of that, as the first processors that had them ran slower meanwhile. Where much is computed
    of few numbers from memory, the whole is a quarter faster on later ones.
    """

    def codegen(context, builder, signature, arguments):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite knows other attributes only
        return context.get_dummy_value()

    return types.void(), codegen
