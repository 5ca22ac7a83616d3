"""Packed bytes are unchanged after their sharding as floats; ``test_distributed`` shards across processes."""

import pytest
import torch
from torch import nn

from adaptkit.training.network.packed_rows import in_dtype
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
    assert torch.equal(in_dtype(nn.Parameter(floats, requires_grad=False), dtype), part)


def test_an_odd_number_of_bytes_is_not_reinterpreted():
    assert _as_floats(torch.zeros(7, dtype=torch.uint8)) is None
    assert _as_floats(torch.zeros(7)).dtype == torch.float32
