"""Decoding with a permutation instruction, which does sixteen look-ups at once, on processors that have one.

The compiler does not generate that instruction from a loop, so this module emits LLVM instructions. The table holds the
sixteen possible weights of a block, rounded to the output type. AVX-512 looks up whole weights. Other x86 (SSSE3) and
ARM (NEON) processors look up bytes, so their table is cut into planes: the first bytes of all weights, the second
bytes, and so on. Each plane is looked up with the codes, and the resulting bytes are interleaved.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from adaptkit.numerics.kernels._cpu_lookup import CHUNK, PERMUTATION, PERMUTATIONS_OF_WEIGHTS
from adaptkit.numerics.kernels._llvm_product import repeated

_BYTE, _WORD = ir.IntType(8), ir.IntType(32)
_BYTES = ir.VectorType(_BYTE, 16)
_WORDS = ir.VectorType(_WORD, 16)


def splat(kind, value):
    """Return a constant vector whose elements all have one value."""
    return ir.Constant(kind, [value] * kind.count)


def _weave(builder, first, second):
    """Interleave the elements of two vectors."""
    count = first.type.count
    mask = [index // 2 + (count if index % 2 else 0) for index in range(2 * count)]
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_WORD, 2 * count), mask))


def _to_bfloat16(builder, bits):
    """Round sixteen float32, given as bits, to the bits of bfloat16, as in ``_cpu_float``."""
    odd = builder.and_(builder.lshr(bits, splat(_WORDS, 16)), splat(_WORDS, 1))
    return builder.lshr(builder.add(builder.add(bits, splat(_WORDS, 0x7FFF)), odd), splat(_WORDS, 16))


def _to_float16(builder, bits):
    """Round sixteen float32, given as bits, to the bits of float16, as in ``_cpu_float``."""
    size = builder.and_(bits, splat(_WORDS, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, splat(_WORDS, 13)), splat(_WORDS, 1))
    offset = splat(_WORDS, 0xFFF - 0x38000000)
    result = builder.lshr(builder.add(builder.add(size, offset), odd), splat(_WORDS, 13))
    floats = ir.VectorType(ir.FloatType(), 16)
    shifted = builder.bitcast(builder.fadd(builder.bitcast(size, floats), splat(floats, 0.5)), _WORDS)
    denormal = builder.sub(shifted, splat(_WORDS, 0x3F000000))
    for bound, sign, value in ((0x38800000, "<", denormal), (0x477FF000, ">=", 0x7C00), (0x7F800000, ">", 0x7E00)):
        chosen = value if isinstance(value, ir.Value) else splat(_WORDS, value)
        result = builder.select(builder.icmp_unsigned(sign, size, splat(_WORDS, bound)), chosen, result)
    return builder.or_(result, builder.and_(builder.lshr(bits, splat(_WORDS, 16)), splat(_WORDS, 0x8000)))


def _weights(builder, levels, absmax, out_type):
    """Return the bits of the sixteen possible weights of a block, each in the low bits of a 32-bit word."""
    bits = builder.bitcast(builder.fmul(levels, repeated(builder, absmax, levels.type)), _WORDS)
    if out_type == types.uint16:
        return _to_bfloat16(builder, bits)
    return _to_float16(builder, bits) if out_type == types.int16 else bits


def call(builder, name, kind, *arguments):
    """Emit a call of an LLVM intrinsic by name; ``kind`` is the type of its result."""
    function = ir.FunctionType(kind, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def _unpacked(builder, packed):
    """Return the 32 codes of 16 bytes, in order."""
    high, low = builder.lshr(packed, splat(_BYTES, 4)), builder.and_(packed, splat(_BYTES, 15))
    return _weave(builder, high, low)


def _by_words(builder, table, packed, width, name):
    """Look up 32 codes; yield one vector of 16-bit weights, in order.

    The instruction reads the last five bits of an index. The table is there twice, so the first of them has no effect,
    and a whole byte is the index of its second code.
    """
    kind = ir.VectorType(ir.IntType(16), 32)
    places = ir.Constant(ir.VectorType(_WORD, 32), [index % 16 for index in range(32)])
    table = builder.trunc(table, ir.VectorType(kind.element, 16))
    table = builder.shuffle_vector(table, table, places)
    whole = builder.zext(packed, _WORDS)
    pairs = builder.or_(builder.lshr(whole, splat(_WORDS, 4)), builder.shl(whole, splat(_WORDS, 16)))
    yield call(builder, name, kind, table, builder.bitcast(pairs, kind))


def _by_weights(builder, table, packed, width, name):
    """Look up 32 codes; yield vectors of weights, in order."""
    size, codes = 512 // width, _unpacked(builder, packed)
    kind = ir.VectorType(ir.IntType(width), size)
    places = ir.Constant(ir.VectorType(_WORD, size), [index % 16 for index in range(size)])
    table = builder.shuffle_vector(table, table, places)
    for start in range(0, CHUNK, size):
        mask = ir.Constant(ir.VectorType(_WORD, size), list(range(start, start + size)))
        part = builder.shuffle_vector(codes, codes, mask)
        yield call(builder, name, kind, table, builder.zext(part, kind))


def _by_bytes(builder, table, packed, width, name):
    """Look up 32 codes in planes of bytes; yield vectors of weights, in order."""
    codes = _unpacked(builder, packed)
    planes = [builder.trunc(builder.lshr(table, splat(_WORDS, 8 * n)), _BYTES) for n in range(width // 8)]
    for start in range(0, CHUNK, 16):
        mask = ir.Constant(_WORDS, list(range(start, start + 16)))
        part = builder.shuffle_vector(codes, codes, mask)
        found = [call(builder, name, _BYTES, plane, part) for plane in planes]
        while len(found) > 1:  # from 8 to 16 to 32 bits
            wide = ir.VectorType(ir.IntType(2 * found[0].type.element.width), 16)
            pairs = zip(found[::2], found[1::2], strict=True)
            found = [builder.bitcast(_weave(builder, low, high), wide) for low, high in pairs]
        yield found[0]


@intrinsic
def decode_block(typingctx, codes, absmax, levels, out):
    """Decode one block: uint8 codes, its float32 constant, the 16 float32 levels, and the output, bits of a float type.

    All arrays are contiguous; ``out`` has twice as many elements as ``codes``, a multiple of ``CHUNK``.
    """
    if out.dtype not in (types.uint16, types.int16, types.uint32, types.float32):
        return None  # no such function

    def codegen(context, builder, signature, arguments):
        arrays = {n: context.make_array(signature.args[n])(context, builder, arguments[n]) for n in (0, 2, 3)}
        floats = ir.VectorType(ir.FloatType(), 16)
        levels = builder.load(builder.bitcast(arrays[2].data, floats.as_pointer()), align=4)
        out_type = signature.args[3].dtype
        table = _weights(builder, levels, arguments[1], out_type)
        width = out_type.bitwidth
        size = builder.extract_value(arrays[0].shape, 0)
        step = ir.Constant(size.type, CHUNK // 2)
        with cgutils.for_range(builder, builder.udiv(size, step)) as loop:
            start = builder.mul(loop.index, step)
            source = builder.bitcast(builder.gep(arrays[0].data, [start]), _BYTES.as_pointer())
            packed = builder.load(source, align=1)
            whole = PERMUTATIONS_OF_WEIGHTS.get(width)
            decode, name = (_by_bytes, PERMUTATION) if not whole else (_by_words if width == 16 else _by_weights, whole)
            target = builder.gep(arrays[3].data, [builder.mul(start, ir.Constant(size.type, 2))])
            for weights in decode(builder, table, packed, width, name):
                builder.store(weights, builder.bitcast(target, weights.type.as_pointer()), align=1)
                target = builder.gep(target, [ir.Constant(size.type, weights.type.count)])
        return context.get_dummy_value()

    return types.void(codes, types.float32, levels, out), codegen
