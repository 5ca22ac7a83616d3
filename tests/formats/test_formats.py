"""Properties that all formats share."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit import discovery, formats
from adaptkit.errors import NonFiniteError, UsageError
from adaptkit.formats._find import stated_encoding
from adaptkit.formats._format import Encoding, WritableFormat, encoding_of, writable
from adaptkit.numerics.spec import TensorSpec
from adaptkit.numerics.tensors import as_array

NAMES = writable()
BLOCKWISE = ("nf4", "fp4")
ALL = {name: discovery.load(formats, name, "FORMAT") for name in discovery.names(formats)}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def encode(name, weight, block_size=64, measure=False):
    """Encode in a block-wise format, or in rows of any other format's own groups."""
    encoding = Encoding(name, block_size) if name in BLOCKWISE else encoding_of(name)
    spec = TensorSpec("x.weight", "F32", tuple(weight.shape))
    top = float(weight.abs().max()) if weight.numel() else 0.0
    return encoding.codec.encode(as_array(weight).reshape(-1), spec, encoding, top, measure)


@pytest.mark.parametrize("name", ALL)
def test_a_format_is_named_after_its_file_and_says_whether_it_can_be_written(name):
    assert ALL[name].name == name
    assert isinstance(ALL[name], WritableFormat) == (name in NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_block_in_the_configuration_is_recognized(name, double_quant):
    encoding = encoding_of(name, double_quant=double_quant)
    assert stated_encoding(encoding.codec.config_block(["lm_head"], encoding)) == (encoding, ["lm_head"])


@pytest.mark.parametrize("name", ["awq", "gptq", "nonsense"])
def test_an_encoding_needs_a_format_that_can_be_written(name):
    with pytest.raises(UsageError, match=f"unknown name '{name}'") as caught:
        Encoding(name)
    assert caught.value.hint == "choose one of: fp4, fp8, int8, mxfp4, nf4, nvfp4, w4a16"


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_levels_match_bitsandbytes(name):
    assert torch.equal(torch.tensor(ALL[name].book.levels), bnb.get_4bit_type(name, device="cpu"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 30), (3, 96)])
def test_non_finite_values_are_refused_with_their_index(name, dtype, bad, place):
    """Also next to the largest finite numbers, and in a short last block."""
    weight = torch.full((4, 97 if name in BLOCKWISE else 128), torch.finfo(dtype).max / 8, dtype=dtype)
    encode(name, weight, 64)
    weight[place] = bad
    with pytest.raises(
        NonFiniteError, match=rf"\[({place[0] * weight.shape[1] + place[1]}|{place[0]}, {place[1]})\] is {bad}"
    ):
        encode(name, weight, 64)


@pytest.mark.parametrize("name", BLOCKWISE)
def test_a_float64_value_beyond_float32_is_refused(name):
    with pytest.raises(NonFiniteError, match=r"\[70\] is inf"):
        encode(name, torch.eye(1, 128, dtype=torch.float64)[0].roll(70) * 1e300, 64)


@given(
    st.sampled_from(BLOCKWISE), st.sampled_from(DTYPES), st.integers(1, 9), st.integers(0, 200), st.integers(0, 2**31)
)
def test_quantizing_in_pieces_gives_the_bytes_of_the_whole(name, dtype, pieces, rest, seed):
    weight = (torch.randn(64 * pieces + rest, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)
    whole = encode(name, weight, 64)
    cut = 64 * (pieces // 2)
    parts = [encode(name, part, 64) for part in (weight[:cut], weight[cut:])]
    assert np.array_equal(np.concatenate([part.codes for part in parts]), whole.codes)
    assert np.array_equal(np.concatenate([part.constants for part in parts]), whole.constants)


@settings(deadline=None)
@given(
    st.sampled_from(BLOCKWISE),
    st.sampled_from(DTYPES),
    st.integers(1, 700),
    st.sampled_from([32, 64, 256]),
    st.floats(-1.5, 1.5),
    st.integers(0, 2**31),
)
def test_moments_give_the_squared_error_for_any_constant(name, dtype, count, block_size, factor, seed):
    weight = (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)
    quantized = encode(name, weight, block_size, measure=True)
    plain = encode(name, weight, block_size)
    assert plain.moments is None
    assert np.array_equal(plain.codes, quantized.codes)
    assert np.array_equal(plain.constants, quantized.constants)
    constants = torch.from_numpy(quantized.constants * np.float32(factor)).double()
    xx, xl, ll = torch.from_numpy(quantized.moments).double().unbind(1)
    found = xx - 2 * constants * xl + constants**2 * ll
    absmax = constants.float().numpy()
    back = ALL[name].dequantize(quantized.codes, absmax, count, block_size, np.dtype(np.float32))
    lost = (weight.double() - torch.from_numpy(back).double()) ** 2
    expected = torch.nn.functional.pad(lost, (0, -count % block_size)).view(-1, block_size).sum(1)
    assert ((found - expected).abs() <= 1e-6 * (xx + constants**2 * ll)).all()


@pytest.mark.parametrize("name", BLOCKWISE)
def test_a_transposed_weight_is_quantized_in_row_major_order(name):
    weight = torch.randn(96, 65, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned, encoding = as_array(weight).T, Encoding(name, 32)
    found = encoding.codec.encode(turned, TensorSpec("x.weight", "BF16", turned.shape), encoding)
    assert np.array_equal(found.codes, encode(name, weight.T.contiguous(), 32).codes)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_size_that_the_format_lacks_is_refused(name):
    with pytest.raises(UsageError, match=r"block_size: .*found 48"):
        Encoding(name, 48, False)
