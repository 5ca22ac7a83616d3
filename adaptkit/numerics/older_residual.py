"""Decoder of the residuals in undo records of version 1: an entropy coder (rANS) whose frequencies are in the stream.

    varint M                            number of values; if it is 0, nothing follows
    varint S                            number of distinct symbols
    S times: varint gap, varint f       the symbols in ascending order; gap is the symbol minus the previous one minus 1
                                        (the first: the symbol itself); f is its frequency; all f sum to 4096
    4 times: uint32                     the states from which decoding starts
    varint W, W times: uint16           words, in the order in which decoding reads them
    bytes                               raw bits, lowest bit of a byte first, the last byte padded with zeros

Numbers are little-endian. A varint has seven bits per byte, lowest first, and bit 7 set in all bytes but the last.

The i-th symbol is decoded from state number i mod 4, x. A symbol with frequency f has the slots from c, the sum of the
frequencies before it, to c + f - 1. Decoding finds the symbol with c <= x mod 4096 < c + f, sets
x = f ⌊x / 4096⌋ + x mod 4096 - c and, if that is less than 65536, x = 65536 x + the next word. In the end all states
are 65536. A symbol below 192 is the zigzag-encoded value; a larger symbol s stands for a number of s - 184 bits, of
which those below the leading one are raw bits, lowest first.

Source: Jarek Duda's asymmetric numeral systems (arXiv:1311.2540), the range variant, interleaved (arXiv:1402.3392).
"""

from __future__ import annotations

import numpy as np

from adaptkit.numerics.dtypes import Array

_EXACT, _SYMBOLS = 192, 249
_TOTAL, _LEAST = 4096, 65536


def decode(stream: Array, most: int) -> Array:
    """Decode a stream of version 1, about a million values a second; see ``residual.decode``."""
    source = _Source(stream.tobytes())
    count = source.varint()
    if count > most:
        raise ValueError(f"it holds {count} values, expected at most {most}")
    if count == 0:
        source.end()
        return np.empty(0, np.int64)
    slots: list[tuple[int, int, int]] = []
    symbol = -1
    for _ in range(source.varint()):
        symbol += 1 + source.varint()
        frequency = source.varint()
        if symbol >= _SYMBOLS or not 1 <= frequency <= _TOTAL - len(slots):
            raise ValueError("its frequencies are invalid")
        slots += [(symbol, frequency, place) for place in range(frequency)]
    if len(slots) != _TOTAL:
        raise ValueError("its frequencies do not add up")
    states = np.frombuffer(source.take(16), "<u4").tolist()
    words = iter(np.frombuffer(source.take(2 * source.varint()), "<u2").tolist())
    symbols = np.empty(count, np.uint8)
    for i in range(count):
        x = states[i & 3]
        symbols[i], frequency, place = slots[x & 4095]
        x = frequency * (x >> 12) + place
        if x < _LEAST:
            x = x << 16 | next(words, 0)
        states[i & 3] = x
    if states != [_LEAST] * 4 or next(words, None) is not None:
        raise ValueError("its symbols end in the wrong place")
    values = symbols.astype(np.uint64)
    long = np.flatnonzero(symbols >= _EXACT)
    lengths = symbols[long].astype(np.int64) - 185
    total = int(lengths.sum())
    raw = np.unpackbits(np.frombuffer(source.take((total + 7) // 8), np.uint8), bitorder="little")
    if raw[total:].any():
        raise ValueError("it is not padded with zeros")
    source.end()
    starts, numbers = np.cumsum(lengths) - lengths, np.uint64(1) << lengths.astype(np.uint64)
    for bit in range(int(lengths.max(initial=0))):
        has = lengths > bit
        numbers[has] |= raw[starts[has] + bit].astype(np.uint64) << np.uint64(bit)
    values[long] = numbers
    return (values >> np.uint64(1)).view(np.int64) ^ -(values & np.uint64(1)).view(np.int64)


class _Source:
    """Reads bytes from the front of a stream; raises ValueError where it is too short or goes on."""

    def __init__(self, content: bytes) -> None:
        self._content, self._position = content, 0

    def take(self, count: int) -> bytes:
        start, self._position = self._position, self._position + count
        if self._position > len(self._content):
            raise ValueError("it is truncated")
        return self._content[start : self._position]

    def varint(self) -> int:
        number = 0
        for place in range(10):  # enough for 64 bits
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                return number
        raise ValueError("a number in it is too long")

    def end(self) -> None:
        if left := len(self._content) - self._position:
            raise ValueError(f"{left} bytes are left over")
