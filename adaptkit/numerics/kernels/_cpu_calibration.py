"""The loops of ``numerics.calibration``, compiled: the error of a block at a scale, and the search for the best scale.

Sums run over sixteen lanes that are added in one fixed order, so that the compiler can use vectors and the results
depend neither on the machine nor on the number of threads.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.arrays import Array
from adaptkit.numerics.kernels._cpu_blocks import find
from adaptkit.numerics.kernels._jit import jit
from adaptkit.numerics.kernels._reference_blocks import GROUP, TINY
from adaptkit.numerics.kernels.codebook import NF4

LEVELS = np.array(NF4.levels, dtype=np.float32)
BOUNDS = np.array(NF4.bounds, dtype=np.float32)

_LEVELS, _BOUNDS = tuple(LEVELS), tuple(BOUNDS)
_TINY = np.float32(TINY)
_LEAST, _MOST = np.float32(1e-30), np.float32(1e30)


@jit
def nearest_code(t):
    """Return the code of the level nearest to ``t``."""
    code = 0
    for bound in BOUNDS:
        code += bound < t
    return code


@jit
def block_error(x, h, factor, lanes):
    """Return Σ h (x - level · factor)² for the nearest levels; x has a multiple of sixteen elements."""
    reciprocal = np.float32(1) / factor
    lanes[:] = 0
    for start in range(0, x.size, 16):
        for lane in range(16):
            value = x[start + lane]
            error = value - find(value * reciprocal, _BOUNDS, _LEVELS) * factor
            lanes[lane] += h[start + lane] * error * error
    for width in (8, 4, 2, 1):
        for lane in range(width):
            lanes[lane] += lanes[lane + width]
    return lanes[0]


@jit
def scale_block(weights, x):
    """Write a block divided by its largest magnitude (at least ``TINY``) to ``x``, zero-padded; return the divisor."""
    largest = _TINY
    for i in range(weights.size):
        largest = max(largest, abs(weights[i]))
    x[:] = 0
    for i in range(weights.size):
        x[i] = weights[i] / largest
    return largest


@jit
def _load_block(flat, importance, block, block_size, x, h):
    """Write a block to ``x`` as ``scale_block`` does, and its zero-padded importance to ``h``; return the divisor."""
    start = block * block_size
    size = min(block_size, flat.size - start)
    h[:] = 0
    column = start % importance.size
    for i in range(size):
        h[i] = importance[column]
        column = column + 1 if column + 1 < importance.size else 0
    return scale_block(flat[start : start + size], x)


@jit
def _within(factor):
    """Clamp the magnitude of a factor so that dividing by it does not overflow; keep its sign."""
    size = min(max(abs(factor), _LEAST), _MOST)
    return -size if factor < 0 else size


@jit
def best_code(x, h, largest, levels, nested, offset, first, reach, signed, lanes):
    """Return the nested code, at most ``reach`` away from ``first``, whose constant fits a scaled block best.

    Unless ``signed``, codes other than ``first`` whose constant is not positive are skipped.
    """
    best, least = first, np.float32(np.inf)
    for step in range(2 * reach + 1):
        code = first + (step + 1) // 2 * (1 if step % 2 else -1)  # first, first + 1, first - 1, ...
        if code < 0 or code > 255:
            continue
        factor = (np.float32(levels[code] * nested) + offset) / largest
        if step and not signed and factor <= 0:
            continue
        error = block_error(x, h, _within(factor), lanes)
        if error < least:
            best, least = code, error
    return best


def scratch_for(block_size: int) -> tuple[Array, Array, Array]:
    """Make scratch arrays for the loops below: a padded block, its importance, and the sixteen lanes."""
    width = -(-block_size // 16) * 16
    return np.empty(width, np.float32), np.empty(width, np.float32), np.empty(16, np.float32)


@jit
def search_scales(flat, importance, block_size, factors, room, scales):
    """Set each block's scale to its largest magnitude times the best of ``factors``, the earlier one at a tie."""
    x, h, lanes = room
    for block in range(scales.size):
        largest = _load_block(flat, importance, block, block_size, x, h)
        best, least = factors[0], np.float32(np.inf)
        for factor in factors:
            error = block_error(x, h, factor, lanes)
            if error < least:
                best, least = factor, error
        scales[block] = best * largest if largest > _TINY else largest


@jit
def choose_codes(flat, importance, block_size, levels, nested, offset, reach, signed, room, codes):
    """Replace each block's nested code with the one that ``best_code`` finds."""
    x, h, lanes = room
    for block in range(codes.size):
        largest = _load_block(flat, importance, block, block_size, x, h)
        first = np.int64(codes[block])
        codes[block] = best_code(x, h, largest, levels, nested[block // GROUP], offset, first, reach, signed, lanes)


@jit
def total_error(flat, importance, block_size, scales, room):
    """Return the weighted squared error of all blocks at given scales, in float64."""
    x, h, lanes = room
    total = 0.0
    for block in range(scales.size):
        largest = _load_block(flat, importance, block, block_size, x, h)
        error = block_error(x, h, _within(scales[block] / largest), lanes)
        total += np.float64(error) * np.float64(largest) * np.float64(largest)
    return total


@jit
def encode_at(flat, scales, block_size, codes, packed):
    """Write the nearest codes at given scales to ``packed``, two per byte.

    A short last block is scaled by a true division, as in plain NF4. ``codes`` is scratch for a block's codes and one
    more.
    """
    for block in range(scales.size):
        start = block * block_size
        size = min(block_size, flat.size - start)
        scale = scales[block]
        if abs(scale) < _TINY:
            scale = _TINY
        reciprocal = np.float32(1) / scale
        for i in range(size):
            value = flat[start + i]
            codes[i] = nearest_code(value * reciprocal if size == block_size else value / scale)
        codes[size] = 7
        for i in range(0, size, 2):
            packed[(start + i) // 2] = (codes[i] << 4) | codes[i + 1]
