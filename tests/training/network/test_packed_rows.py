"""Frozen weights, decoded by rows or as a whole, by one thread or several, have the bits of the definition."""

import pytest
import torch
from packing import encode

from adaptkit.checkpoint import quantized
from adaptkit.checkpoint.encoding import Encoding
from adaptkit.checkpoint.header import TensorSpec
from adaptkit.numerics.kernels._cpu_lookup import PERMUTATION
from adaptkit.training.network.packed_rows import decoded, packed_rows

needs_instruction = pytest.mark.skipif(
    PERMUTATION is None, reason="this processor has no supported permute instruction"
)


@pytest.fixture(params=[1, 3], ids=["alone", "a team"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def packed(shape, encoding):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = encode(TensorSpec("x.weight", "BF16", shape), weight, encoding)
    return quantized.decode("x.weight", {name.removeprefix("x.weight"): part for name, part in parts.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("shape", "name", "block_size", "by_rows"),
    [
        pytest.param((601, 576), "nf4", 64, True, marks=needs_instruction),
        pytest.param((301, 1024), "fp4", 128, True, marks=needs_instruction),
        pytest.param((3, 500, 192), "nf4", 64, True, marks=needs_instruction),
        ((128, 96), "nf4", 64, False),
        ((64, 256), "int8", 64, False),
    ],
)
def test_decoded_weights_equal_the_formats_definition_bit_for_bit(
    threads, shape, name, block_size, by_rows, double_quant, dtype
):
    weight = packed(shape, Encoding(name, block_size, double_quant and name != "int8"))
    assert (packed_rows(weight) is not None) == by_rows
    assert torch.equal(decoded(weight, dtype), weight.dequantize(dtype))
