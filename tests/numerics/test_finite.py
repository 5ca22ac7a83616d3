"""NaN and infinity are detected in every dtype and position."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.errors import NonFiniteError
from adaptkit.formats._format import Encoding
from adaptkit.numerics.finite import all_finite, check_finite

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@given(st.sampled_from(DTYPES[:3]), st.integers(0, 2**31), st.integers(1, 200))
def test_all_finite_agrees_with_torch_for_any_bits(dtype, seed, count):
    ints = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(ints)
    values = (
        torch.randint(info.min, info.max + 1, (count,), generator=generator, dtype=torch.int64).to(ints).view(dtype)
    )
    assert all_finite(values) == bool(torch.isfinite(values).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_element_is_refused_with_its_index(dtype, bad):
    values = torch.full((3, 4, 5), torch.finfo(dtype).max, dtype=dtype)
    values[0] = -torch.finfo(dtype).max
    check_finite(values)
    values[1, 2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"\[1, 2, 3\]"):
        check_finite(values)


def test_integers_scalars_and_empty_tensors_are_finite():
    assert all_finite(torch.full((3,), 2**30))
    assert all_finite(torch.empty(0))
    assert all_finite(torch.tensor(1.5))


@pytest.mark.parametrize(("ints", "bits", "dtype"), [("uint32", 0x7F800001, "float32"), ("uint16", 0x7C01, "float16")])
def test_a_signaling_nan_is_refused_like_any_other(ints, bits, dtype):
    """numpy warns when it casts one, and in these tests a warning is an error."""
    values = np.array([0, bits, 0], ints).view(dtype)
    with pytest.raises(NonFiniteError, match=r"\[1\] is nan"):
        check_finite(values)
    for name in ("nf4", "int8"):
        with pytest.raises(NonFiniteError, match=r"\[1\] is nan"):
            Encoding(name).codec.encode(values, Encoding(name))
