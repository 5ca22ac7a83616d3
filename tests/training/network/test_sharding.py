"""Packed bytes are unchanged after their sharding as floats; ``test_distributed`` shards across processes."""

import pytest
import torch
from packing import decode, encode
from torch import nn

from adaptkit.formats._format import Encoding
from adaptkit.models.activations import Alive
from adaptkit.numerics.spec import TensorSpec
from adaptkit.training.network.frozen import PackedWeight, _in_dtype
from adaptkit.training.network.sharding import _as_floats


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("size", [2, 4, 6, 510, 1024])
def test_bytes_are_reinterpreted_as_floats_and_restored(size, offset, dtype):
    memory = torch.randint(0, 256, (size + offset,), dtype=torch.uint8)  # includes NaN bit patterns
    part = memory[offset:].view(dtype)
    floats = _as_floats(part)
    assert floats.is_floating_point()
    assert floats.nbytes == size
    assert torch.equal(_in_dtype(nn.Parameter(floats, requires_grad=False), dtype), part)


def test_an_odd_number_of_bytes_is_not_reinterpreted():
    assert _as_floats(torch.zeros(7, dtype=torch.uint8)) is None
    assert _as_floats(torch.zeros(7)).dtype == torch.float32


def test_only_the_codes_of_one_matrix_are_copied_of_a_stack_that_processes_share():
    matrices = torch.randn((16, 64, 256), generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = encode(TensorSpec("x.weight", "BF16", tuple(matrices.shape)), matrices, Encoding("nf4"))
    weight = PackedWeight(decode("x.weight", {name.removeprefix("x.weight"): part for name, part in parts.items()}))
    expected, codes = weight.dequantize(torch.float32), weight.codes
    del weight.codes
    weight.codes = nn.Parameter(codes.view(torch.float32), requires_grad=False)
    assert weight.is_divided
    assert torch.equal(weight.dequantize(torch.float32), expected)
    for index in range(16):
        with Alive([weight.codes, weight.absmax]) as alive:
            matrix = weight.matrix(index)
        assert matrix.codes.untyped_storage().data_ptr() != weight.codes.untyped_storage().data_ptr()
        assert alive.peak < codes.nbytes // 4
        assert torch.equal(matrix.dequantize(torch.float32), expected[index])
