"""Rotary positions, one pass over all heads of all tokens; tensors are bits (see ``_cpu_float``)."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from adaptkit.compiled import inlined
from adaptkit.numerics.kernels._cpu_float import rounded, value
from adaptkit.team import shared


@inlined
def _sum(out, x, cos, y, sin):
    """X cos + y sin, both products rounded, and the sum."""
    return rounded(out, value(out, rounded(out, x * cos)) + value(out, rounded(out, y * sin)))


@shared("x")
def rotate(x, cos, sin, back, out, part):
    """Rotate pairs of elements by angles, or gradients by those rotated back: the transposed matrices.

    Args:
        x: (tokens, heads, dim) bits; an element's partner is half of dim away.
        cos: (period, dim) bits: those of a token are in the row of its number modulo the period.
        sin: (period, dim) bits.
        back: whether to take the transposed matrices.
        out: (tokens, heads, dim) bits, written.
        part: of the tokens.
    """
    half = x.shape[2] // 2
    for t in range(part.first, part.last):
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
