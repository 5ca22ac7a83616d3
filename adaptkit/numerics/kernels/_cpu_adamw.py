"""AdamW and its 8-bit moments in one pass over memory each; ``numerics.adamw`` says what they compute.

A sum with a product in it is rounded once, as torch's vector instructions do it; here that is asked for by name, since
a compiler left to itself fuses some of a loop's operations and not others, and the result would depend on where a
vector ends.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.compiled import jit
from adaptkit.numerics.kernels._cpu_instructions import fma
from adaptkit.team import shared


@shared("p")
def update(p, g, m, v, decay, weight, beta2, square_weight, root_correction, eps, step_size, part):
    """All arrays are float32 of one length, all numbers float32; p, m and v are changed."""
    p, g = p[part.first : part.last], g[part.first : part.last]
    m, v = m[part.first : part.last], v[part.first : part.last]
    for i in range(p.size):
        gradient, first = g[i], m[i]
        if weight < np.float32(0.5):  # settled before the loop; torch's lerp begins at the nearer end
            first = fma(weight, gradient - first, first)
        else:
            first = fma(weight - np.float32(1), gradient - first, gradient)
        second = fma(square_weight * gradient, gradient, v[i] * beta2)
        m[i], v[i] = first, second
        p[i] = p[i] * decay + (step_size * first) / (np.sqrt(second) / root_correction + eps)


@jit
def encode(x, block_size, bounds, starts, most, codes, absmax):
    """Number the bounds below each value, after its block was divided by its largest magnitude; above zero at least 1.

    Args:
        x: (N,) float32.
        block_size: values sharing one constant.
        bounds: (256,) float32, ascending, the last one infinite.
        starts: (65536,) uint8; by the upper half of a float's bits, the bounds below all floats with it.
        most: of the bounds that lie among such floats.
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
    """Level times constant: (N,) float32, written to ``x``."""
    for block in range(absmax.size):
        scale = absmax[block]
        for i in range(block * block_size, min((block + 1) * block_size, codes.size)):
            x[i] = levels[codes[i]] * scale
