"""Compression of residuals: an entropy coder (rANS) whose frequencies are in the stream. Same bytes on every machine.

    varint M                            number of values; if it is 0, nothing follows
    varint S                            number of distinct symbols
    S times: varint gap, varint f       the symbols in ascending order; gap is the symbol minus the previous one minus 1
                                        (the first: the symbol itself); f is its frequency; all f sum to 4096
    4 times: uint32                     the states from which decoding starts, each at least 65536
    varint W                            number of words
    W times: uint16                     the words, in the order in which decoding reads them
    bytes                               raw bits, lowest bit of a byte first, the last byte padded with zeros

Numbers are little-endian. A varint has seven bits per byte, lowest first, and bit 7 set in all bytes but the last.

A value v is first zigzag-encoded: z = 2v, or -2v - 1 if v is negative. A z below 192 is its own symbol. A larger z of n
bits has the symbol 184 + n, and its n - 1 bits below the leading one are stored in the raw bits, lowest first.

The i-th symbol is decoded from state number i mod 4, x. A symbol with frequency f has the slots from c, the sum of the
frequencies before it, to c + f - 1. Decoding finds the symbol with c <= x mod 4096 < c + f, sets
x = f ⌊x / 4096⌋ + x mod 4096 - c and, if that is less than 65536, x = 65536 x + the next word. In the end all states
are 65536.

Frequencies are ⌊4096 count / M⌋, but at least 1. If their sum is too small, the most frequent symbol gets the rest; if
it is too large, 1 is subtracted from the currently largest (of equal ones, the lowest symbol) until it fits.

Source: Jarek Duda's asymmetric numeral systems (arXiv:1311.2540), the range variant, interleaved (Giesen,
arXiv:1402.3392).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adaptkit.lazy import lazy_module
from adaptkit.numerics.arrays import Array, Values, as_array
from adaptkit.numerics.kernels._entropy import LEAST, PRECISION, STATES, SYMBOLS

_loops = lazy_module("adaptkit.numerics.kernels._cpu_entropy")

_TOTAL = 1 << PRECISION
_LARGEST_VARINT = 10
"""In bytes: enough for 64 bits."""


def encode(residual: Values) -> Array:
    """Compress residuals.

    Args:
        residual: (M,) int64.

    Returns:
        (N,) uint8, N at least 1.
    """
    values = np.ascontiguousarray(as_array(residual))
    if values.size == 0:
        return np.zeros(1, np.uint8)
    symbols, counts = np.empty(values.size, np.uint8), np.zeros((STATES, 256), np.int64)
    bits = int(_loops.split(values, symbols, counts))
    raw = np.zeros(bits // 64 + 2, np.uint64)
    if bits:
        _loops.put_raw(values, symbols, raw)
    frequencies = _frequencies(counts.sum(axis=0)[:SYMBOLS])
    states, words = np.full(STATES, LEAST, np.uint64), np.empty(values.size + 1, np.uint16)
    begin = _loops.push(symbols, _encoding_table(frequencies), states, words)
    used = words[begin:].astype("<u2").tobytes()
    present = np.flatnonzero(frequencies).tolist()
    parts = [_varint(values.size), _varint(len(present))]
    for before, symbol in zip([-1, *present], present, strict=False):
        parts += [_varint(symbol - before - 1), _varint(int(frequencies[symbol]))]
    parts += [
        states.astype("<u4").tobytes(),
        _varint(len(used) // 2),
        used,
        raw.astype("<u8").tobytes()[: (bits + 7) // 8],
    ]
    return np.frombuffer(bytearray(b"".join(parts)), np.uint8)


def decode(stream: Values, most: int) -> Array:
    """Undo ``encode``.

    Args:
        stream: (N,) uint8, possibly malformed; no memory beyond it is read.
        most: largest number of values to accept, which also limits the memory used.

    Returns:
        (M,) int64, M at most ``most``.

    Raises:
        ValueError: the stream is malformed, or has more than ``most`` values.
    """
    source = _Reader(np.ascontiguousarray(as_array(stream)))
    count = source.varint()
    if count > most:
        raise ValueError(f"it holds {count} values, expected at most {most}")
    if count == 0:
        source.end()
        return np.empty(0, np.int64)
    slots = _slots(source)
    states = source.take(4 * STATES).view("<u4").astype(np.uint64)
    words = source.take(2 * source.varint()).view("<u2").astype(np.uint16)
    symbols = np.empty(count, np.uint8)
    padded = np.concatenate([words, np.zeros(STATES, np.uint16)])
    used = _loops.pop(states, slots, padded, symbols)
    if used != words.size or (states != LEAST).any():
        raise ValueError("its symbols end in the wrong place")
    bits = _loops.raw_bits(symbols)
    raw = np.zeros(8 * (bits // 64 + 2), np.uint8)
    tail = source.take((bits + 7) // 8)
    raw[: tail.size] = tail
    if bits % 8 and tail[-1] >> (bits % 8):
        raise ValueError("it is not padded with zeros")
    source.end()
    values = np.empty(count, np.int64)
    _loops.join(symbols, raw.view("<u8").astype(np.uint64), values)
    return values


class _Reader:
    """Reads bytes from the front of a stream.

    Its methods raise ValueError if the stream is too short, a varint is too long, or bytes are left at the end.
    """

    def __init__(self, content: Any) -> None:
        self._rest = content

    def take(self, count: int) -> Any:
        if count > self._rest.size:
            raise ValueError("it is truncated")
        taken, self._rest = self._rest[:count].copy(), self._rest[count:]
        return taken

    def varint(self) -> int:
        number = 0
        for place in range(_LARGEST_VARINT):
            byte = int(self.take(1)[0])
            number |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                return number
        raise ValueError("a number in it is too long")

    def end(self) -> None:
        if self._rest.size:
            raise ValueError(f"{self._rest.size} bytes are left over")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _frequencies(counts: Any) -> Any:
    """Scale counts to a sum of 4096, with at least 1 for each symbol that occurs; see the module's docstring."""
    total = int(counts.sum())
    scaled = np.array([max(1, int(count) * _TOTAL // total) if count else 0 for count in counts.tolist()], np.int64)
    surplus = int(scaled.sum()) - _TOTAL
    if surplus < 0:
        scaled[int(counts.argmax())] -= surplus
    for _ in range(surplus):
        scaled[int(scaled.argmax())] -= 1
    return scaled


def _encoding_table(frequencies: Any) -> Any:
    """Return the table that ``_cpu_entropy.push`` reads: (symbols, 4) uint64."""
    f = frequencies.astype(np.uint64)
    safe = np.maximum(f, np.uint64(1))
    inverse = (np.uint64(1 << (32 + PRECISION)) + safe - np.uint64(1)) // safe
    return np.stack([inverse, np.uint64(_TOTAL) - f, np.cumsum(f) - f, f << np.uint64(32 - PRECISION)], axis=1)


def _slots(source: _Reader) -> Any:
    """Read the frequencies, and return for each of the 4096 slots (f - 1) << 20 | (slot - c) << 8 | symbol, uint32."""
    symbols: list[int] = []
    frequencies: list[int] = []
    for _ in range(source.varint()):
        symbols.append(source.varint() + (symbols[-1] + 1 if symbols else 0))
        frequencies.append(source.varint())
        if symbols[-1] >= SYMBOLS or not 1 <= frequencies[-1] <= _TOTAL:
            raise ValueError("its frequencies are invalid")
    if sum(frequencies) != _TOTAL:
        raise ValueError("its frequencies do not add up")
    f = np.array(frequencies, np.uint32)
    start = np.cumsum(f, dtype=np.uint32) - f
    packed = (f - 1) << 20 | np.array(symbols, np.uint32)
    return np.repeat(packed, f) | (np.arange(_TOTAL, dtype=np.uint32) - np.repeat(start, f)) << 8
