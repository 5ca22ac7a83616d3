"""A packed residual comes back, is small, and no other bytes are taken for one."""

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.checkpoint.undo import pack, undo_name, unpack
from adaptkit.errors import IntegrityError

RESIDUALS = st.lists(
    st.one_of(st.integers(-3, 3), st.sampled_from([-129, -128, -127, 126, 127, 128]), st.integers(-(2**62), 2**62)),
    max_size=60,
)


@given(RESIDUALS, st.integers(0, 5))
def test_a_residual_comes_back(values, more):
    residual = torch.tensor(values, dtype=torch.int64)
    packed = pack(residual)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, len(values) + more), residual)


def test_the_layout_is_the_one_that_is_documented():
    values = [0, -5, 127, 128, -128, -1000, 2**40]
    stream = zlib.decompress(pack(torch.tensor(values)).numpy().tobytes())
    assert int.from_bytes(stream[:8], "little") == len(values)
    small = np.frombuffer(stream, np.int8, len(values), offset=8).tolist()
    assert small == [0, -5, 127, -128, -128, -128, -128]
    assert np.frombuffer(stream, "<i8", offset=8 + len(values)).tolist() == [128, -128, -1000, 2**40]


def test_small_residuals_take_less_than_two_bits_each():
    generator = torch.Generator().manual_seed(0)
    residual = torch.randint(-1, 2, (20_000,), generator=generator)
    assert pack(residual).numel() * 8 < 2 * residual.numel()


@given(RESIDUALS.filter(bool), st.data())
def test_a_flipped_bit_is_noticed(values, data):
    """zlib's own checksum does it; the fingerprint of the restored weight would be next."""
    packed = pack(torch.tensor(values, dtype=torch.int64))
    broken = packed.clone()
    broken[data.draw(st.integers(2, packed.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = unpack(broken, len(values))
    except IntegrityError:
        return
    assert found.tolist() == values  # a bit of the stream's padding


@given(RESIDUALS.filter(bool))
def test_a_record_longer_than_the_weight_is_refused(values):
    with pytest.raises(IntegrityError, match="not a residual"):
        unpack(pack(torch.tensor(values, dtype=torch.int64)), len(values) - 1)


def stream(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(content)), dtype=torch.uint8)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(1, dtype=torch.uint8),
        torch.arange(50, dtype=torch.uint8),
        stream(b""),
        stream(bytes(7)),
        stream((5).to_bytes(8, "little") + bytes(4)),
        stream((5).to_bytes(8, "little") + bytes(6)),
        stream((-1).to_bytes(8, "little", signed=True)),
        stream((2).to_bytes(8, "little") + b"\x80\x00"),
        stream((1).to_bytes(8, "little") + b"\x80" + bytes(16)),
        pack(torch.zeros(9, dtype=torch.int64))[:-2],
    ],
)
def test_other_bytes_are_no_residual(packed):
    with pytest.raises(IntegrityError, match="not a residual"):
        unpack(packed, 100)


def test_a_record_that_would_unpack_to_a_gigabyte_is_refused_without_doing_so():
    bomb = stream(bytes(1 << 24))
    assert bomb.numel() < 20_000
    with pytest.raises(IntegrityError, match="not a residual"):
        unpack(bomb, 1000)


def test_names_sort_like_the_shards():
    assert undo_name(3, 12) == "adaptkit-undo-00003-of-00012.safetensors"
