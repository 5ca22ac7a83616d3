"""The residual coder: values round-trip, bytes follow the layout, and no input crashes the decoder."""

import math
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adaptkit.numerics import residual

INT64 = st.integers(-(2**63), 2**63 - 1)


def array(values):
    return np.array(values, np.int64)


# The layout of the module's docstring, implemented again in plain Python.


def fold(value):
    return 2 * value if value >= 0 else -2 * value - 1


def unfold(z):
    return z >> 1 if z % 2 == 0 else -(z >> 1) - 1


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


def plain_decode(stream):
    position = 0

    def number():
        nonlocal position
        value = shift = 0
        while True:
            byte = stream[position]
            position += 1
            value |= byte % 128 << shift
            shift += 7
            if byte < 128:
                return value

    count = number()
    if count == 0:
        return []
    slots, symbol = [], -1
    for _ in range(number()):
        symbol += 1 + number()
        frequency = number()
        slots += [(symbol, frequency, place) for place in range(frequency)]
    states = list(struct.unpack_from("<4I", stream, position))
    position += 16
    total = number()
    words = list(struct.unpack_from(f"<{total}H", stream, position))
    raw = iter(bit for byte in stream[position + 2 * total :] for bit in f"{byte:08b}"[::-1])
    values = []
    for i in range(count):
        x = states[i % 4]
        symbol, frequency, place = slots[x % 4096]
        x = frequency * (x // 4096) + place
        states[i % 4] = x if x >= 65536 else x * 65536 + words.pop(0)
        bits = symbol - 185 if symbol >= 192 else 0
        values.append((symbol, int("".join(["1", *[next(raw) for _ in range(bits)][::-1]]), 2)))
    return [unfold(symbol if symbol < 192 else z) for symbol, z in values]


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
@example([-(2**63), 2**63 - 1, 0, -1, 95, 96, -96, -97, 127, 128])
def test_values_round_trip_and_bytes_follow_the_layout(values):
    stream = residual.encode(array(values))
    assert stream.dtype == np.uint8
    content = stream.tobytes()
    assert content == plain_encode(values)
    assert plain_decode(content) == values
    assert np.array_equal(residual.decode(stream, len(values)), array(values))


def test_the_encoding_of_a_fixed_sample_never_changes():
    stream = residual.encode(array([1, -1, 1, 1, -2, 0, 3, -1, 1, 70_000]))
    assert stream.tobytes().hex() == (
        "0a0600990300b30600e90c009903029903c3019903a9093e007292f70181171900d67a0c0000e02200"
    )


def bits_each(values):
    return 8 * residual.encode(values).size / values.size


def test_a_constant_stream_takes_a_few_bytes():
    for value in (0, 1, -3, 95, -96):
        assert residual.encode(np.full(1_000_000, value)).size < 32
    assert residual.encode(array([])).size == 1


@pytest.mark.parametrize("spread", [0.5, 2.0, 20.0])
def test_small_values_take_about_their_entropy(spread):
    values = np.random.default_rng(0).normal(0, spread, 200_000).round().astype(np.int64)
    share = np.unique(values, return_counts=True)[1] / values.size
    entropy = -(share * np.log2(share)).sum()
    assert entropy <= bits_each(values) <= 1.01 * entropy + 0.01


def test_differences_of_16_bit_numbers_take_about_17_bits_at_most():
    rng = np.random.default_rng(1)
    assert bits_each(rng.integers(-65535, 65536, 200_000)) < 17.1
    ordinals = rng.normal(0, 0.02, (2, 200_000)).astype(np.float32).view(np.int32) >> 16  # of bfloat16 weights
    places = np.where(ordinals >= 0, ordinals, -(ordinals & 0x7FFF) - 1)
    assert bits_each((places[0] - places[1]).astype(np.int64)) < 15


def test_a_skewed_stream_takes_less_than_a_bit_per_value():
    values = (np.random.default_rng(2).random(200_000) < 0.01).astype(np.int64)
    assert bits_each(values) < 1.05 * -(0.01 * math.log2(0.01) + 0.99 * math.log2(0.99))


@pytest.mark.parametrize("count", range(10))
def test_a_stream_with_more_values_than_the_limit_is_refused(count):
    stream = residual.encode(np.arange(count + 1))
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
    residual.encode(values).tobytes()
    for values in (
        np.random.default_rng(3).choice([-1, 0, 1], 300),
        np.random.default_rng(4).integers(-70_000, 70_000, 50),
        np.full(1000, 5),
        np.arange(-200, 200),
    )
]


@pytest.mark.parametrize("stream", STREAMS)
def test_truncated_and_extended_streams_are_refused(stream):
    for length in range(1, len(stream)):
        assert decode_whatever(stream[:length], 2000) is None
    for more in (b"\x00", b"\xff", b"\x00" * 9):
        assert decode_whatever(stream + more, 2000) is None


@settings(max_examples=600, deadline=None)
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
        residual.decode(np.frombuffer(content, np.uint8), 10)


def test_claimed_sizes_are_checked_before_memory_is_allocated():
    """10¹² values, or 2⁶⁰ words, would otherwise exhaust memory."""
    claims = varint(10**12) + b"\x01\x00\x80\x20" + struct.pack("<4I", *[65536] * 4) + b"\x00"
    with pytest.raises(ValueError, match="at most"):
        residual.decode(np.frombuffer(claims, np.uint8), 10**6)
    words = varint(1) + b"\x01\x00\x80\x20" + struct.pack("<4I", *[65536] * 4) + varint(2**60)
    with pytest.raises(ValueError, match="truncated"):
        residual.decode(np.frombuffer(words, np.uint8), 10**6)
