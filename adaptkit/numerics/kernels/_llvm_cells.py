"""Encoding by cells, see ``_cpu_cells``: the tables fit in vector registers; one instruction does sixteen look-ups.

The compiler does not generate that instruction from a loop, so this module emits LLVM instructions.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from adaptkit.numerics.kernels._cpu_cells import CHUNK, OFFSET, SCALE
from adaptkit.numerics.kernels._llvm_lookup import call, splat
from adaptkit.numerics.kernels._llvm_product import repeated

_WORD = ir.IntType(32)
_BYTES = ir.VectorType(ir.IntType(8), CHUNK // 2)
_WORDS = ir.VectorType(_WORD, CHUNK)
_FLOATS = ir.VectorType(ir.FloatType(), CHUNK)
_DOUBLES = ir.VectorType(ir.DoubleType(), CHUNK)


def _load(builder, data, index, kind):
    """Load a vector of an array's elements, from an index on."""
    return builder.load(builder.bitcast(builder.gep(data, [index]), kind.as_pointer()), align=1)


def _floats(builder, data, index, element):
    """Load sixteen weights as float32; ``element`` is the integer type of their bits, see ``_cpu_float``."""
    if element == types.uint32:
        return _load(builder, data, index, _FLOATS)
    if element == types.int16:
        return builder.fpext(_load(builder, data, index, ir.VectorType(ir.HalfType(), CHUNK)), _FLOATS)
    bits = builder.zext(_load(builder, data, index, ir.VectorType(ir.IntType(16), CHUNK)), _WORDS)
    return builder.bitcast(builder.shl(bits, splat(_WORDS, 16)), _FLOATS)


def _rank(builder, scaled, table):
    """Return the number of bounds below each of sixteen scaled weights."""
    place = builder.fadd(builder.fmul(scaled, splat(_FLOATS, SCALE)), splat(_FLOATS, OFFSET))
    all_of_them, current_rounding = ir.Constant(ir.IntType(16), 0xFFFF), ir.Constant(_WORD, 4)
    convert = "llvm.x86.avx512.mask.cvttps2dq.512"  # defined for NaN too, unlike LLVM's fptosi
    cell = call(builder, convert, _WORDS, place, splat(_WORDS, 0), all_of_them, current_rounding)
    low, high = (builder.bitcast(part, _FLOATS) for part in table[:2])
    bound = call(builder, "llvm.x86.avx512.vpermi2var.ps.512", _FLOATS, low, cell, high)
    below = call(builder, "llvm.x86.avx512.vpermi2var.d.512", _WORDS, table[2], cell, table[3])
    return builder.add(below, builder.zext(builder.fcmp_ordered("<", bound, scaled), _WORDS))


def _look_up(builder, row, index):
    return call(builder, "llvm.x86.avx512.permvar.si.512", _WORDS, row, index)


def _packed(builder, codes):
    """Pack sixteen codes into eight bytes, the first of each pair in the high nibble."""
    pairs = ir.VectorType(ir.IntType(64), CHUNK // 2)
    codes = builder.bitcast(codes, pairs)
    both = builder.or_(builder.shl(codes, splat(pairs, 4)), builder.lshr(codes, splat(pairs, 32)))
    return builder.trunc(both, _BYTES)


def _add_products(builder, weights, levels, sums):
    """Add w², w · l and l² of sixteen weights and levels to float64 vectors, in which these products are exact."""
    w, level = (builder.fpext(values, _DOUBLES) for values in (weights, levels))
    for pointer, (one, other) in zip(sums, ((w, w), (w, level), (level, level)), strict=True):
        product = builder.fmul(one, other, flags=["contract"])
        builder.store(builder.fadd(builder.load(pointer), product, flags=["contract"]), pointer)


def _store_sums(builder, sums, target):
    """Store the three sums as float32."""
    reduce = ir.FunctionType(ir.DoubleType(), [ir.DoubleType(), _DOUBLES])
    function = cgutils.get_or_insert_function(builder.module, reduce, "llvm.vector.reduce.fadd.v16f64")
    for index, pointer in enumerate(sums):
        total = builder.call(function, [ir.Constant(ir.DoubleType(), 0.0), builder.load(pointer)], fastmath=["reassoc"])
        rounded = builder.fptrunc(total, ir.FloatType())
        builder.store(rounded, builder.gep(target, [ir.Constant(_WORD, index)]))


@intrinsic
def encode_block(typingctx, x, reciprocal, rows, codes, moments):
    """Encode one block.

    ``x`` has the bits of the weights, which ``reciprocal`` (float32) scales; ``rows`` is from ``cell_tables``;
    ``codes`` (uint8) and ``moments``, (3,) float32 or None, are written. All arrays are contiguous; ``x`` has twice as
    many elements as ``codes``, a multiple of ``CHUNK``.
    """
    measured = not isinstance(moments, types.NoneType)

    def codegen(context, builder, signature, arguments):
        def array(n):
            return context.make_array(signature.args[n])(context, builder, arguments[n])

        source, rows, out = array(0), array(2), array(3)
        table = [_load(builder, rows.data, ir.Constant(_WORD, 16 * row), _WORDS) for row in range(6)]
        scale = repeated(builder, arguments[1], _FLOATS)
        sums = [cgutils.alloca_once_value(builder, splat(_DOUBLES, 0.0)) for _ in range(3)] if measured else []
        size = builder.extract_value(source.shape, 0)
        with cgutils.for_range(builder, builder.udiv(size, ir.Constant(size.type, CHUNK))) as loop:
            weights = _floats(
                builder, source.data, builder.mul(loop.index, ir.Constant(size.type, CHUNK)), signature.args[0].dtype
            )
            rank = _rank(builder, builder.fmul(weights, scale), table)
            target = builder.gep(out.data, [builder.mul(loop.index, ir.Constant(size.type, CHUNK // 2))])
            packed = _packed(builder, _look_up(builder, table[4], rank))
            builder.store(packed, builder.bitcast(target, _BYTES.as_pointer()), align=1)
            if measured:
                levels = builder.bitcast(_look_up(builder, table[5], rank), _FLOATS)
                _add_products(builder, weights, levels, sums)
        if measured:
            _store_sums(builder, sums, array(4).data)
        return context.get_dummy_value()

    return types.void(x, types.float32, rows, codes, moments), codegen
