"""How residuals are stored: values round-trip, bytes follow the layout, and no input crashes the decoder."""

import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adaptkit.numerics import residual

INT64 = st.integers(-(2**63), 2**63 - 1)


def array(values):
    return np.array(values, np.int64)


def packed(bits):
    digits = "".join(map(str, bits)) + "0" * (-len(bits) % 8)
    return bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))


def plain_encode(values):
    """Follow the layout of the module's docstring in plain Python."""
    left = [2 * value if value >= 0 else -2 * value - 1 for value in values]
    low_bits = max(0, sorted(left)[len(left) // 2].bit_length() - 1) if left else 0
    content = struct.pack("<IB", len(values), low_bits)
    for bit in range(low_bits):
        content += packed([z >> bit & 1 for z in left])
    left = [z >> low_bits for z in left]
    for _ in range(4):
        content += packed([int(z > 0) for z in left])
        left = [z - 1 for z in left if z]
    for size in (1, 2, 4, 8):
        most = 256**size - 1
        content += b"".join(min(z, most).to_bytes(size, "little") for z in left)
        left = [z - most for z in left if z >= most]
    return content


@st.composite
def residuals(draw):
    kind = draw(st.sampled_from(["any", "steps", "near", "far"]))
    if kind == "any":
        return draw(st.lists(INT64, max_size=40))
    rng, count = np.random.default_rng(draw(st.integers(0, 2**31))), draw(st.integers(0, 500))
    if kind == "steps":
        return rng.choice([-2, -1, 0, 1, 2], count, p=[0.05, 0.44, 0.02, 0.44, 0.05]).tolist()
    return rng.normal(0, 40 if kind == "near" else 20_000, count).astype(np.int64).tolist()


@settings(max_examples=300, deadline=None)
@given(residuals())
@example([-(2**63), 2**63 - 1, 0, -1, 1, 2, -3, 129, -130, 130, 32_897, 32_898, 2**31, 2**33])
def test_values_round_trip_and_bytes_follow_the_layout(values):
    stream = residual.encode(array(values))
    assert stream == plain_encode(values)
    decoded = residual.decode(np.frombuffer(stream, np.uint8), len(values))
    assert decoded.dtype == np.int64
    assert decoded.tolist() == values


def test_the_encoding_of_a_fixed_sample_never_changes():
    stream = residual.encode(array([1, -1, 1, 1, -2, 0, 3, -1, 1, 70_000]))
    assert stream.hex() == "0a000000014900bac00ac040ffffff6e100000"


def bits_each(values):
    return 8 * len(residual.encode(values)) / values.size


@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0, 20.0, 1000.0])
def test_values_take_little_more_than_their_entropy(spread):
    values = np.random.default_rng(0).normal(0, spread, 200_000).round().astype(np.int64)
    share = np.unique(values, return_counts=True)[1] / values.size
    entropy = -(share * np.log2(share)).sum()
    assert entropy <= bits_each(values) <= 1.3 * entropy


@pytest.mark.parametrize("count", range(10))
def test_a_stream_with_more_values_than_the_limit_is_refused(count):
    stream = np.frombuffer(residual.encode(np.arange(count + 1)), np.uint8)
    with pytest.raises(ValueError, match="at most"):
        residual.decode(stream, count)


def decode_whatever(content, most):
    """Decode at most ``most`` values; return None after a ``ValueError``, and fail for anything else."""
    try:
        values = residual.decode(np.frombuffer(content, np.uint8), most)
    except ValueError:
        return None
    assert values.dtype == np.int64
    assert values.size <= most
    return values


STREAMS = [
    residual.encode(values)
    for values in (
        np.random.default_rng(3).choice([-1, 0, 1], 300),
        np.random.default_rng(4).integers(-70_000, 70_000, 50),
        np.full(1000, 5),
        np.arange(-200, 200),
    )
]


@pytest.mark.parametrize("stream", STREAMS)
def test_truncated_and_extended_streams_are_refused(stream):
    for length in range(len(stream)):
        assert decode_whatever(stream[:length], 2000) is None
    for more in (b"\x00", b"\xff", b"\x00" * 9):
        assert decode_whatever(stream + more, 2000) is None


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(STREAMS), st.data())
def test_corrupted_streams_never_crash_the_decoder(stream, data):
    changed = bytearray(stream)
    for place in data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=4)):
        changed[place] = data.draw(st.integers(0, 255))
    decode_whatever(bytes(changed), data.draw(st.sampled_from([0, 400, 5000])))


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 60))
def test_arbitrary_bytes_never_crash_the_decoder(content, count):
    decode_whatever(content, 1000)
    decode_whatever(struct.pack("<IB", count, count) + content, 1000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0", "truncated"),
        (b"\xff\xff\xff\xff", "at most"),
        (b"\1\0\0\0\0\1", "padded with zeros"),
        (b"\1\0\0\0\x40\0", "64 low bits"),
        (b"\0\0\0\0\0\0", "1 bytes are left over"),
    ],
)
def test_the_error_says_what_is_wrong_with_a_stream(content, message):
    with pytest.raises(ValueError, match=message):
        residual.decode(np.frombuffer(content, np.uint8), 10)
