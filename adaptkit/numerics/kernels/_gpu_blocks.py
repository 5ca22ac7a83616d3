"""The block-wise part of ``reference`` as Triton kernels: one program computes a few whole blocks.

To give exactly the bits of ``reference``, products are not fused with additions (launches set ``enable_fp_fusion`` to
False), divisions are rounded as IEEE 754 requires (``_quotient``), and rounding to 16 bits operates on the bits.
Offsets are 64-bit: a fused expert tensor may have more than 2^31 weights.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import triton
import triton.language as tl


@triton.jit
def _magnitude_bits(x):
    """Return the magnitudes' bits as integers, which sort like magnitudes, infinity and NaN last."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _quotient(a, b):
    """Divide float32 numbers, in float64, since some releases of Triton flush denormals in float32's ``div_rn``.

    float64 has more than 2 · 24 + 2 bits of precision, so rounding twice gives the same result as rounding once.
    """
    return (a.to(tl.float64) / b.to(tl.float64)).to(tl.float32)


@triton.jit
def _widened(x, kind: tl.constexpr):
    """Convert loaded weights to float32; bfloat16 (``kind`` 1) is loaded as bits."""
    return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True) if kind == 1 else x.to(tl.float32)


@triton.jit
def _rounded(x, kind: tl.constexpr):
    """Convert float32 to a ``kind``: 0 is float32 itself, 1 the bits of bfloat16, 2 the bits of float16."""
    if kind == 0:
        narrow = x
    elif kind == 1:
        narrow = _bfloat16_bits(x.to(tl.uint32, bitcast=True))
    else:
        narrow = _float16_bits(x.to(tl.uint32, bitcast=True))
    return narrow


@triton.jit
def _bfloat16_bits(bits):
    x = bits.to(tl.float32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # cannot carry into the sign, except for a NaN
    return (tl.where(x == x, rounded, (bits & 0x80000000) | 0x7FC00000) >> 16).to(tl.uint16)


@triton.jit
def _float16_bits(bits):
    size = bits & 0x7FFFFFFF
    normal = (size + 0xFFF + ((size >> 13) & 1) - 0x38000000) >> 13
    # One half has the spacing of float16's denormals, so adding it rounds to them.
    denormal = (size.to(tl.float32, bitcast=True) + 0.5).to(tl.uint32, bitcast=True) - 0x3F000000
    result = tl.where(size < 0x38800000, denormal, normal)
    result = tl.where(size >= 0x477FF000, 0x7C00, result)
    result = tl.where(size > 0x7F800000, 0x7E00, result)
    return (result | ((bits >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def encode_4bit(
    weights,
    tables,
    codes,
    absmax,
    moments,
    count,
    tiny,
    block: tl.constexpr,
    group: tl.constexpr,
    kind: tl.constexpr,
    measure: tl.constexpr,
):
    """Encode ``count`` blocks; ``tables`` holds 15 bounds, 16 codes and 16 levels, in ascending order of levels."""
    half: tl.constexpr = block // 2
    rows = tl.program_id(0).to(tl.int64) * group + tl.arange(0, group)
    inside = rows < count
    pairs = rows[:, None] * half + tl.arange(0, half)[None, :]
    mask = inside[:, None] & (tl.arange(0, half)[None, :] < half)
    first = _widened(tl.load(weights + 2 * pairs, mask=mask, other=0), kind)
    second = _widened(tl.load(weights + 2 * pairs + 1, mask=mask, other=0), kind)
    largest = tl.max(tl.maximum(_magnitude_bits(first), _magnitude_bits(second)), axis=1)
    scale = largest.to(tl.float32, bitcast=True)
    tl.store(absmax + rows, scale, mask=inside)
    one = tl.full((group,), 1.0, tl.float32)
    reciprocal = _quotient(one, tl.maximum(scale, tl.full((group,), tiny, tl.float32)))[:, None]
    a, b = first * reciprocal, second * reciprocal
    high, low = tl.load(tables + 15) + tl.zeros_like(a), tl.load(tables + 15) + tl.zeros_like(b)
    for j in tl.static_range(15):
        bound, code = tl.load(tables + j), tl.load(tables + 16 + j)
        high, low = tl.where(bound < a, code, high), tl.where(bound < b, code, low)
    tl.store(codes + pairs, ((high.to(tl.int32) << 4) | low.to(tl.int32)).to(tl.uint8), mask=mask)
    if measure:
        high, low = tl.load(tables + 31) + tl.zeros_like(a), tl.load(tables + 31) + tl.zeros_like(b)
        for j in tl.static_range(15):
            bound, level = tl.load(tables + j), tl.load(tables + 32 + j)
            high, low = tl.where(bound < a, level, high), tl.where(bound < b, level, low)
        x, y, u, v = first.to(tl.float64), second.to(tl.float64), high.to(tl.float64), low.to(tl.float64)
        tl.store(moments + 3 * rows, tl.sum(x * x + y * y, axis=1).to(tl.float32), mask=inside)
        tl.store(moments + 3 * rows + 1, tl.sum(x * u + y * v, axis=1).to(tl.float32), mask=inside)
        tl.store(moments + 3 * rows + 2, tl.sum(u * u + v * v, axis=1).to(tl.float32), mask=inside)


@triton.jit
def decode_4bit(codes, absmax, levels, out, count, block: tl.constexpr, group: tl.constexpr, kind: tl.constexpr):
    """Decode ``count`` blocks; ``levels`` holds the level of each code, ``out`` has the result type of ``_rounded``."""
    rows = tl.program_id(0).to(tl.int64) * group + tl.arange(0, group)
    inside = rows < count
    _decode(codes, tl.load(absmax + rows, mask=inside, other=0.0), levels, out, rows, inside, block, kind)


@triton.jit
def decode_nested_4bit(
    codes,
    constants,
    nested,
    nested_levels,
    levels,
    out,
    offset,
    count,
    block: tl.constexpr,
    group: tl.constexpr,
    nest: tl.constexpr,
    kind: tl.constexpr,
):
    """Do ``decode_constants`` and ``decode_4bit`` in one; ``nest`` of ``constants`` share one element of ``nested``."""
    rows = tl.program_id(0).to(tl.int64) * group + tl.arange(0, group)
    inside = rows < count
    scale = _nested_scale(constants, nested, nested_levels, rows, rows // nest, inside) + offset
    _decode(codes, scale, levels, out, rows, inside, block, kind)


@triton.jit
def decode_parts_4bit(
    codes,
    constants,
    nested,
    nested_levels,
    levels,
    out,
    offsets,
    places,
    count,
    parts: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
    nest: tl.constexpr,
    kind: tl.constexpr,
):
    """Do ``decode_nested_4bit`` for several concatenated weights.

    ``places`` holds the index of each weight's first block, then the index of each one's first element of ``nested``.
    """
    rows = tl.program_id(0).to(tl.int64) * group + tl.arange(0, group)
    inside = rows < count
    part = tl.zeros((group,), tl.int32)
    for j in tl.static_range(1, parts):
        part += (rows >= tl.load(places + j)).to(tl.int32)
    number = tl.load(places + parts + part) + (rows - tl.load(places + part)) // nest
    scale = _nested_scale(constants, nested, nested_levels, rows, number, inside) + tl.load(offsets + part)
    _decode(codes, scale, levels, out, rows, inside, block, kind)


@triton.jit
def _nested_scale(constants, nested, nested_levels, rows, number, inside):
    """Decode constants, without their offset; ``number`` is the index in ``nested`` of each one's own constant."""
    code = tl.load(constants + rows, mask=inside, other=0).to(tl.int32)
    return tl.load(nested_levels + code) * tl.load(nested + number, mask=inside, other=0.0)


@triton.jit
def _decode(codes, scale, levels, out, rows, inside, block: tl.constexpr, kind: tl.constexpr):
    """Decode blocks. One thread writes both weights of a byte: single ones would waste half of each transfer."""
    half: tl.constexpr = block // 2
    pair, place = tl.arange(0, half)[None, :], tl.arange(0, block)[None, :]
    byte = tl.load(codes + rows[:, None] * half + pair, mask=inside[:, None] & (pair < half), other=0).to(tl.int32)
    both = tl.interleave(tl.load(levels + (byte >> 4)), tl.load(levels + (byte & 15)))
    tl.store(
        out + rows[:, None] * block + place, _rounded(both * scale[:, None], kind), inside[:, None] & (place < block)
    )


@triton.jit
def encode_8bit(
    weights,
    codes,
    absmax,
    moments,
    count,
    size,
    block: tl.constexpr,
    group: tl.constexpr,
    kind: tl.constexpr,
    measure: tl.constexpr,
):
    """Encode ``count`` blocks of ``size`` weights; ``block`` is the next power of two of ``size``."""
    rows = tl.program_id(0).to(tl.int64) * group + tl.arange(0, group)
    inside = rows < count
    column = tl.arange(0, block)[None, :]
    offsets = rows[:, None] * size + column
    mask = inside[:, None] & (column < size)
    x = _widened(tl.load(weights + offsets, mask=mask, other=0), kind)
    scale = tl.max(_magnitude_bits(x), axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax + rows, scale, mask=inside)
    top = tl.full((group,), 127.0, tl.float32)
    divisor = tl.where(scale > 0, scale, 1.0)
    factor = tl.where(scale > 0, _quotient(top, divisor), 0.0)
    scaled = x * factor[:, None]
    if tl.max(factor, axis=0) > 3.4028234663852886e38:  # rare: absmax below 4e-37
        divided = _quotient(x, tl.zeros_like(x) + divisor[:, None]) * 127.0
        scaled = tl.where(factor[:, None] > 3.4028234663852886e38, divided, scaled)
    # Adding 1.5 · 2^23 leaves the nearest integer, ties to even, in the low bits.
    q = ((scaled + 12582912.0).to(tl.int32, bitcast=True) << 24) >> 24
    tl.store(codes + offsets, q.to(tl.int8), mask=mask)
    if measure:
        y, z = x.to(tl.float64), tl.where(mask, q, 0).to(tl.float64)
        tl.store(moments + 3 * rows, tl.sum(y * y, axis=1).to(tl.float32), mask=inside)
        tl.store(moments + 3 * rows + 1, (tl.sum(y * z, axis=1) / 127.0).to(tl.float32), mask=inside)
        tl.store(moments + 3 * rows + 2, (tl.sum(z * z, axis=1) / 16129.0).to(tl.float32), mask=inside)


@triton.jit
def decode_8bit(codes, steps, out, count, size: tl.constexpr, chunk: tl.constexpr, kind: tl.constexpr):
    """Decode ``count`` weights, ``size`` of which share a step; the last block may be shorter.

    ``size`` is a compile-time constant, since a 64-bit integer division takes a hundred instructions.
    """
    offsets = tl.program_id(0).to(tl.int64) * chunk + tl.arange(0, chunk)
    mask = offsets < count
    q = tl.load(codes + offsets, mask=mask, other=0).to(tl.float32)
    tl.store(out + offsets, _rounded(q * tl.load(steps + offsets // size, mask=mask, other=0.0), kind), mask=mask)


@triton.jit
def decode_constants(codes, nested, levels, out, offset, count, chunk: tl.constexpr, group: tl.constexpr):
    """Decode ``count`` constants; ``group`` share one of ``nested``; ``levels`` holds the level of each code."""
    offsets = tl.program_id(0).to(tl.int64) * chunk + tl.arange(0, chunk)
    mask = offsets < count
    code = tl.load(codes + offsets, mask=mask, other=0).to(tl.int32)
    scale = tl.load(nested + offsets // group, mask=mask, other=0.0)
    tl.store(out + offsets, tl.load(levels + code) * scale + offset, mask=mask)
