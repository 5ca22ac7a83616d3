"""Weights in FP8 are read in runs of rows, so that memory does not grow with a matrix."""

from hypothesis import given
from hypothesis import strategies as st

from adaptkit.checkpoint.low_precision import Fp8Weight

SIZES = st.integers(1, 40)


@given(st.integers(0, 3), SIZES, SIZES, st.integers(1, 300))
def test_runs_of_rows_cover_a_stack_in_order_and_hold_no_more_weights_than_asked(matrices, rows, columns, weights):
    weight = Fp8Weight("w", "w_scale_inv", (matrices, rows, columns), (rows, columns), ())
    runs = list(weight.runs(weights))
    covered = [(matrix, row) for matrix, first, count in runs for row in range(first, first + count)]
    assert covered == [(matrix, row) for matrix in range(matrices) for row in range(rows)]
    assert all(count * columns <= max(weights, columns) for _, _, count in runs)
