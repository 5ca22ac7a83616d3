"""Residuals of undo records of version 1 are read; no input crashes the decoder."""

import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adaptkit.numerics import older_residual

INT64 = st.integers(-(2**63), 2**63 - 1)


# The encoder of the layout in the module's docstring, in plain Python.


def fold(value):
    return 2 * value if value >= 0 else -2 * value - 1


def symbol_of(z):
    return z if z < 192 else 184 + z.bit_length()


def varint(number):
    out = b""
    while number >= 128:
        out += bytes([number % 128 + 128])
        number //= 128
    return out + bytes([number])


def frequencies_of(symbols):
    counts = {symbol: symbols.count(symbol) for symbol in sorted(set(symbols))}
    scaled = {symbol: max(1, 4096 * count // len(symbols)) for symbol, count in counts.items()}
    surplus = sum(scaled.values()) - 4096
    if surplus < 0:
        scaled[max(counts, key=lambda s: (counts[s], -s))] -= surplus
    for _ in range(surplus):
        scaled[max(scaled, key=lambda s: (scaled[s], -s))] -= 1
    return scaled


def plain_encode(values):
    if not values:
        return b"\x00"
    folded = [fold(value) for value in values]
    symbols = [symbol_of(z) for z in folded]
    frequencies = frequencies_of(symbols)
    begins, total = {}, 0
    for symbol, frequency in frequencies.items():
        begins[symbol], total = total, total + frequency
    states, words = [65536] * 4, []
    for i in reversed(range(len(symbols))):
        f, c, x = frequencies[symbols[i]], begins[symbols[i]], states[i % 4]
        if x >= f << 20:
            words.insert(0, x % 65536)
            x >>= 16
        states[i % 4] = (x // f << 12) + x % f + c
    head, before = varint(len(values)) + varint(len(frequencies)), -1
    for symbol, frequency in frequencies.items():
        head, before = head + varint(symbol - before - 1) + varint(frequency), symbol
    raw = "".join(bin(z)[:2:-1] for z in folded if z >= 192)  # all but the leading bit, lowest first
    packed = b"".join(int(raw[i : i + 8][::-1], 2).to_bytes(1) for i in range(0, len(raw), 8))
    return head + struct.pack("<4I", *states) + varint(len(words)) + struct.pack(f"<{len(words)}H", *words) + packed


@st.composite
def residuals(draw):
    kind = draw(st.sampled_from(["any", "steps", "near", "far"]))
    if kind == "any":
        return draw(st.lists(INT64, max_size=40))
    rng, count = np.random.default_rng(draw(st.integers(0, 2**31))), draw(st.integers(0, 500))
    if kind == "steps":
        return rng.choice([-2, -1, 0, 1, 2], count, p=[0.05, 0.44, 0.02, 0.44, 0.05]).tolist()
    return rng.normal(0, 40 if kind == "near" else 20_000, count).astype(np.int64).tolist()


@settings(max_examples=200, deadline=None)
@given(residuals())
@example([-(2**63), 2**63 - 1, 0, -1, 95, 96, -96, -97, 127, 128])
def test_streams_of_version_1_are_decoded(values):
    stream = np.frombuffer(plain_encode(values), np.uint8)
    assert older_residual.decode(stream, len(values)).tolist() == values
    with pytest.raises(ValueError, match=r"at most|left over"):
        older_residual.decode(np.append(stream, np.uint8(1)), len(values))


def test_a_stream_that_version_1_wrote_is_decoded():
    stream = bytes.fromhex("0a0600990300b30600e90c009903029903c3019903a9093e007292f70181171900d67a0c0000e02200")
    expected = [1, -1, 1, 1, -2, 0, 3, -1, 1, 70_000]
    assert older_residual.decode(np.frombuffer(stream, np.uint8), 10).tolist() == expected


def decode_whatever(content, most):
    """Decode at most ``most`` values; return None after a ``ValueError``, and fail for anything else."""
    try:
        values = older_residual.decode(np.frombuffer(content, np.uint8), most)
    except ValueError:
        return None
    assert values.dtype == np.int64
    assert values.size <= most
    return values


STREAMS = [plain_encode([(7 * i * i) % 3 - 1 for i in range(300)]), plain_encode([70 * i * i for i in range(-20, 20)])]


@pytest.mark.parametrize("stream", STREAMS)
def test_truncated_and_extended_streams_are_refused(stream):
    for length in range(1, len(stream)):
        assert decode_whatever(stream[:length], 2000) is None
    for more in (b"\x00", b"\xff", b"\x00" * 9):
        assert decode_whatever(stream + more, 2000) is None


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(STREAMS), st.data())
def test_corrupted_streams_never_crash_the_decoder(stream, data):
    changed = bytearray(stream)
    for place in data.draw(st.lists(st.integers(0, min(len(stream) - 1, 80)), min_size=1, max_size=4)):
        changed[place] = data.draw(st.integers(0, 255))
    decode_whatever(bytes(changed), data.draw(st.sampled_from([0, 400, 5000])))


@settings(max_examples=400, deadline=None)
@given(st.binary(min_size=1, max_size=60))
def test_arbitrary_bytes_never_crash_the_decoder(content):
    decode_whatever(content, 1000)
    table = b"\x02\x00\x80\x10\x00\x80\x10"  # two symbols that share the slots
    decode_whatever(varint(900) + table + content, 1000)
    decode_whatever(varint(900) + varint(1) + varint(248) + varint(4096) + content, 1000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80" * 20, "too long"),
        (b"\x01\x01\xff\x01\x80\x20", "frequencies are invalid"),
        (b"\x01\x01\x00\x00", "frequencies are invalid"),
        (b"\x01\x01\x00\x80\x40", "frequencies are invalid"),
        (b"\x01\x01\x00\x05", "do not add up"),
        (b"\x01\x01\x00\x80\x20" + struct.pack("<4I", *[65537] + [65536] * 3) + b"\x00", "symbols end"),
        (b"\x01\x01\x00\x80\x20" + struct.pack("<4I", *[65536] * 4) + b"\x01ab", "symbols end"),
        (b"\x01\x01\xc0\x01\x80\x20" + struct.pack("<4I", *[65536] * 4) + b"\x00\x80", "zeros"),
        (b"\x00\x00", "left over"),
    ],
)
def test_the_error_says_what_is_wrong_with_a_stream(content, message):
    with pytest.raises(ValueError, match=message):
        older_residual.decode(np.frombuffer(content, np.uint8), 10)


def test_claimed_sizes_are_checked_before_memory_is_allocated():
    """10¹² values, or 2⁶⁰ words, would otherwise exhaust memory."""
    claims = varint(10**12) + b"\x01\x00\x80\x20" + struct.pack("<4I", *[65536] * 4) + b"\x00"
    with pytest.raises(ValueError, match="at most"):
        older_residual.decode(np.frombuffer(claims, np.uint8), 10**6)
    words = varint(1) + b"\x01\x00\x80\x20" + struct.pack("<4I", *[65536] * 4) + varint(2**60)
    with pytest.raises(ValueError, match="truncated"):
        older_residual.decode(np.frombuffer(words, np.uint8), 10**6)
