"""AdamW and the coding of its 8-bit moments, in one pass over memory each; ``training.memory.adamw`` defines them.

A product plus a term is rounded once, as in torch's vector instructions: a compiler that may fuse does so for some
operations of a loop only, and results would depend on where a vector ends.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.kernels._jit import inlined, jit


@inlined
def _fused(a, b, c):
    """Return a · b + c of float32, rounded once, but for sums in float64 that are themselves rounded to a tie."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


@jit
def update(p, g, m, v, decay, weight, beta2, square_weight, root_correction, eps, step_size):
    """Update p, m and v in place; all arrays are float32 of one length, all numbers float32."""
    for i in range(p.size):
        gradient, first = g[i], m[i]
        if weight < np.float32(0.5):  # hoisted out of the loop; torch's lerp starts from the nearer end
            first = _fused(weight, gradient - first, first)
        else:
            first = _fused(weight - np.float32(1), gradient - first, gradient)
        second = _fused(square_weight * gradient, gradient, v[i] * beta2)
        m[i], v[i] = first, second
        p[i] = p[i] * decay + (step_size * first) / (np.sqrt(second) / root_correction + eps)


@jit
def encode(x, block_size, bounds, starts, most, codes, absmax):
    """Encode each value, divided by its block's largest magnitude, as the number of bounds below it.

    The code of a positive value is at least 1.

    Args:
        x: (N,) float32.
        block_size: number of values that share one constant.
        bounds: (256,) float32, ascending, the last one infinite.
        starts: (65536,) uint8; for each upper half of a float's bits, the number of bounds below all floats with it.
        most: maximum number of bounds among the floats with the same upper half.
        codes: (N,) uint8, written.
        absmax: (ceil(N / block_size),) float32, written.
    """
    for block in range(absmax.size):
        values = x[block * block_size : (block + 1) * block_size]
        out = codes[block * block_size : (block + 1) * block_size]
        largest = np.float32(0)
        for i in range(values.size):
            largest = max(largest, abs(values[i]))
        absmax[block] = largest
        divisor = largest if largest > 0 else np.float32(1)
        for i in range(values.size):
            scaled = values[i] / divisor
            code = np.int32(starts[np.float32(scaled).view(np.uint32) >> np.uint32(16)])
            for _ in range(most):
                code += bounds[code] < scaled
            out[i] = code if code > 0 or values[i] <= 0 else 1


@jit
def decode(codes, absmax, block_size, levels, x):
    """Write level times constant to ``x``, (N,) float32."""
    for block in range(absmax.size):
        scale = absmax[block]
        for i in range(block * block_size, min((block + 1) * block_size, codes.size)):
            x[i] = levels[codes[i]] * scale
