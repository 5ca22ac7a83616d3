"""What is divided among processes comes back as the bytes that it was (``test_distributed`` divides for real)."""

import pytest
import torch
from torch import nn

from adaptkit.training.network.linear import _in_dtype
from adaptkit.training.network.sharding import _as_floats


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("size", [2, 4, 6, 510, 1024])
def test_bytes_travel_as_floats_and_come_back(size, offset, dtype):
    memory = torch.randint(0, 256, (size + offset,), dtype=torch.uint8)  # among them are NaNs of every kind
    part = memory[offset:].view(dtype)
    floats = _as_floats(part)
    assert floats.is_floating_point()
    assert floats.nbytes == size
    assert torch.equal(_in_dtype(nn.Parameter(floats, requires_grad=False), dtype), part)


def test_an_odd_number_of_bytes_stays_whole():
    assert _as_floats(torch.zeros(7, dtype=torch.uint8)) is None
    assert _as_floats(torch.zeros(7)).dtype == torch.float32
