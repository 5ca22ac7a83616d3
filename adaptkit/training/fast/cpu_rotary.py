"""Rotary position embedding in one pass over all heads of all tokens; tensors are bits (see ``_cpu_float``)."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from adaptkit.numerics.kernels._cpu_float import rounded, value
from adaptkit.numerics.kernels._jit import inlined
from adaptkit.training.fast.threads import shared


@inlined
def _sum(out, x, cos, y, sin):
    """Return x · cos + y · sin; both products are rounded, and so is the sum."""
    return rounded(out, value(out, rounded(out, x * cos)) + value(out, rounded(out, y * sin)))


@shared("x")
def rotate(x, cos, sin, back, out, part):
    """Rotate pairs of elements by angles, or, for the backward pass, gradients by the transposed matrices.

    Args:
        x: (tokens, heads, dim) bits; the two elements of a pair are dim / 2 apart.
        cos: (period, dim) bits; token t uses row t modulo period.
        sin: (period, dim) bits.
        back: whether to use the transposed matrices.
        out: (tokens, heads, dim) bits, written.
        part: tokens to compute.
    """
    half = x.shape[2] // 2
    for t in range(part[1], part[2]):
        row = t % cos.shape[0]
        c1, c2, s1, s2 = cos[row, :half], cos[row, half:], sin[row, :half], sin[row, half:]
        for head in range(x.shape[1]):
            a, b, first, second = x[t, head, :half], x[t, head, half:], out[t, head, :half], out[t, head, half:]
            for i in range(half):
                left, right = value(x, a[i]), value(x, b[i])
                cos1, cos2, sin1, sin2 = value(x, c1[i]), value(x, c2[i]), value(x, s1[i]), value(x, s2[i])
                if back:
                    first[i] = _sum(out, left, cos1, right, sin2)
                    second[i] = _sum(out, right, cos2, -left, sin1)
                else:
                    first[i] = _sum(out, left, cos1, -right, sin1)
                    second[i] = _sum(out, right, cos2, left, sin2)
