"""NF4 bytes match those of bitsandbytes' CPU backend."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from adaptkit.errors import UsageError
from adaptkit.formats import nf4
from adaptkit.formats._format import Encoding
from adaptkit.numerics.absmax import dequantize_absmax, dynamic_levels, quantize_absmax
from adaptkit.numerics.spec import TensorSpec
from adaptkit.numerics.tensors import as_array, as_tensor


def test_the_levels_for_constants_match_bitsandbytes():
    assert torch.equal(torch.from_numpy(dynamic_levels()), bnb.create_dynamic_map(signed=True))
    assert dynamic_levels()[[127, 255]].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 192), (64, 64), (33, 65), (7, 9), (1000, 576)])
def test_bytes_match_bitsandbytes(shape, dtype):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.03).to(dtype)
    weight[0, :5] = 0
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    found = nf4.FORMAT.encode(as_array(weight), TensorSpec("", "BF16", weight.shape), Encoding())
    assert torch.equal(as_tensor(found.codes), expected.view(-1))
    double = quantize_absmax(found.constants)
    np.testing.assert_allclose(double.nested_absmax, state.state2.absmax.numpy(), rtol=1e-6)
    ulp = float(torch.finfo(torch.float32).eps) * abs(double.offset)
    assert abs(double.offset - float(state.offset)) <= ulp
    if double.offset == float(state.offset):
        assert np.array_equal(double.codes, state.absmax.numpy())
    else:  # the documented difference: the offset is one unit in the last place off, and a few codes with it
        assert (double.codes != state.absmax.numpy()).mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_decoded_weights_match_bitsandbytes(dtype):
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    piece = nf4.FORMAT.encode(as_array(weight), TensorSpec("", "BF16", weight.shape), Encoding())
    found = nf4.FORMAT.dequantize(piece.codes, piece.constants, weight.numel(), 64, as_array(weight).dtype)
    assert torch.equal(as_tensor(found).view(weight.shape), bnb.dequantize_4bit(packed, state))


def test_constants_round_trip_with_a_small_error():
    absmax = torch.rand(1000, generator=torch.Generator().manual_seed(5)).numpy() + np.float32(0.5)
    back = dequantize_absmax(quantize_absmax(absmax))
    assert np.abs(back - absmax).max() < 0.01


@pytest.mark.parametrize("block_size", [0, 16, 48, 8192])
def test_a_block_size_that_no_reader_supports_is_refused(block_size):
    with pytest.raises(UsageError, match="power of two"):
        Encoding("nf4", block_size)


def test_no_constant_decodes_to_a_negative_number():
    """Those of bitsandbytes do in groups with one outlier, which flips the signs of whole blocks."""
    generator = torch.Generator().manual_seed(1)
    absmax = torch.rand(4096, generator=generator) * 0.02
    absmax[::97] = 20.0
    quantized = quantize_absmax(absmax.numpy())
    assert float(dequantize_absmax(quantized).min()) >= 0
    weight = torch.randn(4096, 64, generator=generator) * (absmax.unsqueeze(1) / 4)
    _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert float(theirs.min()) < 0
