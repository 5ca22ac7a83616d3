"""Properties that all formats share."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit import discovery, formats
from adaptkit.errors import NonFiniteError, UsageError
from adaptkit.formats._blockwise import Blockwise

NAMES = discovery.names(formats)
FORMATS = {name: discovery.load(formats, name, "FORMAT") for name in NAMES}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_named_after_its_file(name):
    assert FORMATS[name].name == name
    assert name in {"nf4", "fp4", "int8"}


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_levels_match_bitsandbytes(name):
    assert torch.equal(torch.tensor(FORMATS[name].levels), bnb.get_4bit_type(name, device="cpu"))


def test_int8_has_no_table_of_levels():
    assert FORMATS["int8"].levels is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 30), (3, 96)])
def test_non_finite_values_are_refused_with_their_index(name, dtype, bad, place):
    """Also next to the largest finite numbers, and in a short last block."""
    weight = torch.full((4, 97), torch.finfo(dtype).max, dtype=dtype)
    FORMATS[name].quantize(weight, 64)
    weight[place] = bad
    with pytest.raises(NonFiniteError, match=rf"\[{place[0]}, {place[1]}\] is {bad}"):
        FORMATS[name].quantize(weight, 64)


@pytest.mark.parametrize("name", NAMES)
def test_a_float64_value_beyond_float32_is_refused(name):
    with pytest.raises(NonFiniteError, match=r"\[70\] is inf"):
        FORMATS[name].quantize(torch.eye(1, 128, dtype=torch.float64)[0].roll(70) * 1e300, 64)


@given(st.sampled_from(NAMES), st.sampled_from(DTYPES), st.integers(1, 9), st.integers(0, 200), st.integers(0, 2**31))
def test_quantizing_in_pieces_gives_the_bytes_of_the_whole(name, dtype, pieces, rest, seed):
    weight = (torch.randn(64 * pieces + rest, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)
    whole = FORMATS[name].quantize(weight, 64)
    cut = 64 * (pieces // 2)
    parts = [FORMATS[name].quantize(part, 64) for part in (weight[:cut], weight[cut:])]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    assert torch.equal(torch.cat([part.absmax for part in parts]), whole.absmax)


@settings(deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(DTYPES),
    st.integers(1, 700),
    st.sampled_from([32, 64, 256]),
    st.floats(-1.5, 1.5),
    st.integers(0, 2**31),
)
def test_moments_give_the_squared_error_for_any_constant(name, dtype, count, block_size, factor, seed):
    weight = (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)
    quantized = FORMATS[name].quantize(weight, block_size, measure=True)
    plain = FORMATS[name].quantize(weight, block_size)
    assert plain.moments is None
    assert torch.equal(plain.codes, quantized.codes)
    assert torch.equal(plain.absmax, quantized.absmax)
    constants = (quantized.absmax * factor).double()
    xx, xl, ll = quantized.moments.double().unbind(1)
    found = xx - 2 * constants * xl + constants**2 * ll
    other = Blockwise(quantized.codes, constants.float(), quantized.shape, block_size)
    lost = (weight.double() - FORMATS[name].dequantize(other, torch.float32).double()) ** 2
    expected = torch.nn.functional.pad(lost, (0, -count % block_size)).view(-1, block_size).sum(1)
    assert ((found - expected).abs() <= 1e-6 * (xx + constants**2 * ll)).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_transposed_weight_is_quantized_in_row_major_order(name):
    weight = torch.randn(96, 65, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = FORMATS[name].quantize(weight.T, 32)
    assert torch.equal(found.codes, FORMATS[name].quantize(weight.T.contiguous(), 32).codes)
    assert found.shape == (65, 96)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_size_below_one_is_refused(name):
    with pytest.raises(UsageError, match=r"block_size: .*found 0"):
        FORMATS[name].quantize(torch.zeros(64), 0)
