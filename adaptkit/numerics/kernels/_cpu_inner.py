"""Inner products of two low-rank changes, compiled, from which their norms and the angle between them follow.

⟨Δ₁, Δ₂⟩ = Σ (B₁ᵀB₂ ∘ A₁A₂ᵀ), so inner products of a few long vectors are needed. For a matrix library all numbers would
have to be converted to float64 first, and the call itself would take longer than so few products.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.compiled import compiled, jit
from adaptkit.numerics.arrays import Array, Values, as_array, cast

_WIDTH = 128
"""Elements of every vector that are converted at a time: those of 32 vectors fit the cache."""
_LISTS = 4
"""Vectors that two others are multiplied with at a time, so that each loaded element is used more than once."""


@compiled(fastmath={"reassoc", "contract"})
def _add_products(room, count, gram):
    """Add to ``gram`` the lower triangle of inner products (and some above it), in tiles of two vectors by four."""
    for i in range(0, room.shape[0], 2):
        p, q, top, bottom = room[i], room[i + 1], gram[i], gram[i + 1]
        for j in range(0, i + 2, _LISTS):
            w, x, y, z = room[j], room[j + 1], room[j + 2], room[j + 3]
            pw, px, py, pz, qw, qx, qy, qz = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            for k in range(count):
                pw += p[k] * w[k]
                px += p[k] * x[k]
                py += p[k] * y[k]
                pz += p[k] * z[k]
                qw += q[k] * w[k]
                qx += q[k] * x[k]
                qy += q[k] * y[k]
                qz += q[k] * z[k]
            top[j] += pw
            top[j + 1] += px
            top[j + 2] += py
            top[j + 3] += pz
            bottom[j] += qw
            bottom[j + 1] += qx
            bottom[j + 2] += qy
            bottom[j + 3] += qz


@jit
def _widen_rows(rows, left, count, room, first):
    for i in range(rows.shape[0]):
        values, wide = rows[i, left : left + count], room[first + i]
        for k in range(count):
            wide[k] = values[k]


@jit
def _widen_columns(columns, top, count, room, first):
    for k in range(count):
        values = columns[top + k]
        for i in range(values.size):
            room[first + i, k] = values[i]


@jit
def _inner_products(a, b, other_a, other_b, room, of_a, of_b, sums):
    rank, ranks = a.shape[0], a.shape[0] + other_a.shape[0]
    for left in range(0, a.shape[1], _WIDTH):
        count = min(_WIDTH, a.shape[1] - left)
        _widen_rows(a, left, count, room, 0)
        _widen_rows(other_a, left, count, room, rank)
        _add_products(room, count, of_a)
    for top in range(0, b.shape[0], _WIDTH):
        count = min(_WIDTH, b.shape[0] - top)
        _widen_columns(b, top, count, room, 0)
        _widen_columns(other_b, top, count, room, rank)
        _add_products(room, count, of_b)
    for i in range(ranks):
        for j in range(i + 1):
            product = of_a[i, j] * of_b[i, j]
            if i < rank:
                sums[0] += product if i == j else 2 * product
            elif j < rank:
                sums[1] += product
            else:
                sums[2] += product if i == j else 2 * product


def inner_products(a: Values, b: Values, other_a: Values, other_b: Values) -> tuple[float, float, float]:
    """Return ⟨Δ₁, Δ₁⟩, ⟨Δ₁, Δ₂⟩ and ⟨Δ₂, Δ₂⟩ for Δ₁ = b a and Δ₂ = other_b other_a, in float64.

    Args:
        a: (K₁, in), of any float type.
        b: (out, K₁).
        other_a: (K₂, in).
        other_b: (out, K₂).
    """
    arrays = [as_array(values) for values in (a, b, other_a, other_b)]
    dtype = np.float64 if any(array.dtype == np.float64 for array in arrays) else np.float32
    padded = -(-(len(arrays[0]) + len(arrays[2])) // _LISTS) * _LISTS
    room, sums = [np.zeros((padded, _WIDTH)), *np.zeros((2, padded, padded))], np.zeros(3)
    _inner_products(*(_contiguous(array, dtype) for array in arrays), *room, sums)
    first, between, second = sums.tolist()
    return first, between, second


def _contiguous(array: Array, dtype: type[np.floating]) -> Array:
    return np.ascontiguousarray(array if array.dtype == dtype else cast(array, dtype))
