"""Weights that are integers of few bits: (code - zero point) * scale, with constants shared by groups of a row.

Codes are packed into streams of bits, lowest first, in words of 32 bits: column c of a row of b bits lies at bits
[c b, (c + 1) b). ``w4a16``, ``awq`` and ``gptq`` say along which axis their streams run.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from adaptkit.errors import CheckpointError
from adaptkit.formats._stored import GET_AGAIN, Files
from adaptkit.numerics.dtypes import ARRAY_DTYPES, Array, cast
from adaptkit.numerics.spec import TensorSpec

WORD = 32
"""Number of bits in a word."""
_A_WORD = 8
"""Number of codes of 4 bits in a word."""
_READ_AT_A_TIME = 1 << 18
"""Number of bytes of a transposed tensor read at a time, so that they stay in the cache."""


@cache
def levels(bits: int, middle: int = 0) -> Array:
    """Return the levels of unsigned codes, (2 ** bits,) float32, when code ``middle`` stands for 0."""
    return np.arange(1 << bits, dtype=np.float32) - np.float32(middle)


def unpack(words: Array, bits: int, count: int) -> Array:
    """Return the codes in streams of bits.

    Args:
        words: (streams, ceil(count * bits / 32)) of any type of four bytes, little-endian.
        bits: of a code, 1 to 8.
        count: number of codes in a stream.

    Returns:
        (streams, count) uint8.
    """
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw[:, :count]
    if 8 % bits:  # codes cross bytes
        stream = np.unpackbits(raw, axis=1, count=count * bits, bitorder="little").reshape(len(raw), count, bits)
        return np.packbits(stream, axis=2, bitorder="little")[..., 0]
    shifts, mask = np.arange(0, 8, bits, dtype=np.uint8), np.uint8((1 << bits) - 1)
    return (raw[..., None] >> shifts & mask).reshape(len(raw), -1)[:, :count]


def pack(codes: Array, bits: int) -> Array:
    """Invert ``unpack``: return (streams, count) codes as bytes, (streams, 4 ceil(count * bits / 32)) uint8."""
    streams, count = codes.shape
    found = np.zeros((streams, -(-count * bits // WORD) * (WORD // 8)), np.uint8)
    stream = np.unpackbits(codes[..., None], axis=2, count=bits, bitorder="little").reshape(streams, -1)
    packed = np.packbits(stream, axis=1, bitorder="little")
    found[:, : packed.shape[1]] = packed
    return found


def read_columns(files: Files, spec: TensorSpec, start: int, stop: int) -> Array:
    """Read some columns of a matrix of words: (rows, stop - start); all of it passes through memory, in slices."""
    rows, columns = spec.shape
    found = np.empty((rows, stop - start), np.int32)
    step = max(1, _READ_AT_A_TIME // (4 * columns))
    for first in range(0, rows, step):
        part = files.read_flat(spec.name, first * columns, min(step, rows - first) * columns)
        found[first : first + step] = part.reshape(-1, columns)[:, start:stop]
    return found


def pack_down(codes: Array) -> Array:
    """Return (rows, groups) uint8 codes of 4 bits as streams down the rows: (ceil(rows / 8), groups) int32."""
    rows, groups = codes.shape
    whole = np.pad(codes, ((0, -rows % _A_WORD), (0, 0))).astype(np.uint32).reshape(-1, _A_WORD, groups)
    words = np.bitwise_or.reduce(whole << np.arange(0, WORD, 4, dtype=np.uint32)[:, None], axis=1)
    found: Array = words.view(np.int32)
    return found


def read_groups(files: Files, name: str, columns: int, groups: int) -> Array | None:
    """Return the group of each column, (columns,), from a tensor that says it; None without one.

    Raises:
        CheckpointError: it names a group that is not there.
    """
    if name not in files.tensors:
        return None
    found = files.read(name)
    bad = found[(found < 0) | (found >= groups)]
    if bad.size:
        raise CheckpointError(f"{name}: names group {bad[0]} of {groups}", hint=GET_AGAIN)
    return found


def read_scales(spec: TensorSpec, values: Array) -> Array:
    """Return scales as float32.

    Raises:
        CheckpointError: one is 0 or not finite.
    """
    scales = cast(values, np.float32)
    bad = ~np.isfinite(scales) | (scales == 0)
    if bad.any():
        raise CheckpointError(f"{spec.name}: a scale is {scales[bad][0]:g}", hint=GET_AGAIN)
    return scales


def stored_scales(scales: Array, dtype: str) -> tuple[Array, Array]:
    """Return scales rounded to a type, but not to 0, as the file has them, and the same in float32."""
    kind = ARRAY_DTYPES[dtype]
    stored = np.maximum(cast(scales, kind), np.nextafter(np.zeros(1, kind), np.ones(1, kind)))
    return stored, cast(stored, np.float32)


def require(spec: TensorSpec, types: tuple[str, ...], shape: tuple[int, ...]) -> TensorSpec:
    """Check type and shape of a part, and return its spec.

    Raises:
        CheckpointError: they are others.
    """
    if spec.dtype not in types or spec.shape != shape:
        expected = f"{' or '.join(types)} {list(shape)}"
        raise CheckpointError(f"{spec.name}: is {spec.dtype} {list(spec.shape)}; expected {expected}", hint=GET_AGAIN)
    return spec


def spec_of(files: Files, name: str) -> TensorSpec:
    """Return the spec of a part.

    Raises:
        CheckpointError: it is missing.
    """
    if name not in files.tensors:
        raise CheckpointError(f"{files.root}: {name} is missing", hint=GET_AGAIN)
    return files.spec(name)
