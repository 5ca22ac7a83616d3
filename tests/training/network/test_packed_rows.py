"""Frozen weights, decoded by rows or as a whole, by one thread or several, have the bits of the definition."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from packing import decode, encode
from torch import nn

from adaptkit.formats._format import Encoding
from adaptkit.models.activations import Alive
from adaptkit.numerics.spec import TensorSpec
from adaptkit.training.network.frozen import PackedWeight
from adaptkit.training.network.packed_rows import decoded, packed_rows


@pytest.fixture(params=[1, 3], ids=["one", "several"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def packed(shape, encoding):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = encode(TensorSpec("x.weight", "BF16", shape), weight, encoding)
    return decode("x.weight", {name.removeprefix("x.weight"): part for name, part in parts.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("shape", "name", "block_size", "by_rows"),
    [
        ((601, 576), "nf4", 64, True),
        ((301, 1024), "fp4", 128, True),
        ((3, 500, 192), "nf4", 64, True),
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


def test_the_rows_of_a_weight_are_made_once_unless_processes_share_it():
    """Then its parts are gathered in every pass, into new memory."""
    parts = packed((64, 128), Encoding("nf4"))
    weight = PackedWeight(parts)
    first = weight.rows()
    assert weight.rows() is first
    for factor in (1, 3):
        others = replace(parts, codes=parts.codes * factor)
        del weight.codes
        weight.codes = nn.Parameter(others.codes.view(torch.float32), requires_grad=False)
        assert weight.is_divided
        assert torch.equal(weight.dequantize(torch.float32), others.dequantize(torch.float32))
        assert weight.rows() is not weight.rows()
        assert weight._rows == (None, 0)  # the whole weight is freed


def test_the_rows_of_a_copied_or_changed_weight_are_its_own():
    """A copy of the rows of another weight would also take as much memory as the weight."""
    weight = PackedWeight(packed((64, 128), Encoding("nf4")))
    weight.rows()
    copied = deepcopy(weight)
    assert copied._rows == (None, 0)
    assert copied.rows().codes.ctypes.data == copied.codes.data_ptr() != weight.codes.data_ptr()
    others = {name: part.clone() for name, part in weight.state_dict().items()} | {"codes": weight.codes.flip(0)}
    copied.load_state_dict(others, assign=True)
    assert torch.equal(copied.dequantize(torch.float32), copied.quantized().dequantize(torch.float32))
    assert not torch.equal(copied.dequantize(torch.float32), weight.dequantize(torch.float32))
    assert copied.to("meta").rows() is None
    assert copied._rows == (None, 0)


def test_only_the_codes_of_one_matrix_are_copied_of_a_stack_that_processes_share():
    parts = packed((16, 64, 256), Encoding("nf4"))
    weight = PackedWeight(parts)
    expected = weight.dequantize(torch.float32)
    del weight.codes
    weight.codes = nn.Parameter(parts.codes.view(torch.float32), requires_grad=False)
    for index in range(16):
        with Alive([weight.codes, weight.absmax]) as alive:
            matrix = weight.matrix(index)
        assert matrix.codes.untyped_storage().data_ptr() != weight.codes.untyped_storage().data_ptr()
        assert alive.peak < parts.codes.nbytes // 4
        assert torch.equal(decoded(matrix, torch.float32), expected[index])
