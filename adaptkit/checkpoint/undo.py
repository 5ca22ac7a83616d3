"""The undo record: what makes a merge reversible to the last bit. Readers of models do not look into its folder.

    adaptkit-undo/shard-00001-of-0000N.safetensors    what was lost of the n-th shard of the result
        X             U8   of each changed tensor of the base: frames of (rows u32, length u32, stream), little-endian,
                           for runs of rows of it; a stream is what ``numerics.residual`` makes of the residuals
        X:lengths:a   F64  of DoRA, by the number of the adapter: the lengths of the rows of W + Δ
        X:rest             last rows of a tensor that has fewer in the result, as they were
        :header       U8   the first bytes of the base's shard
    adaptkit-undo/files.safetensors                   U8, by name: small files of the base that the result has not, or
                                                       has changed, ``:`` for ``/``; ``:added`` lists those that only
                                                       the result has
    adaptkit-undo/base/...                            of a base that was an artifact: its manifest, with its signature
                                                       if it has one, and its files that the result has no place for,
                                                       its own undo record among them
    adaptkit-adapters/1/...                           with --embed-adapter, the adapters themselves

Together with the merged weight and the adapter's change this restores the original; see ``reference.undo``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator

import numpy as np

from adaptkit.errors import IntegrityError
from adaptkit.numerics import residual
from adaptkit.numerics.arrays import Array, Values

FOLDER = "adaptkit-undo"
FILES_NAME = f"{FOLDER}/files.safetensors"
BASE_PREFIX = f"{FOLDER}/base/"
ADAPTERS_PREFIX = "adaptkit-adapters/"
HEADER = ":header"
ADDED = ":added"
_FRAME = struct.Struct("<II")


def record_name(number: int, total: int) -> str:
    """Name of the record for the number-th of ``total`` shards."""
    return f"{FOLDER}/shard-{number:05d}-of-{total:05d}.safetensors"


def lengths_name(name: str, adapter: int) -> str:
    """Name of the lengths that a DoRA adapter found for a tensor."""
    return f"{name}:lengths:{adapter}"


def rest_name(name: str) -> str:
    """Name of the last rows of a tensor of the base, if the result has fewer."""
    return f"{name}:rest"


def pack_frame(rows: int, values: Values) -> bytes:
    """What was lost of a run of rows.

    Args:
        rows: in the run.
        values: (M,) int64 residuals.
    """
    stream = residual.encode(values).tobytes()
    return _FRAME.pack(rows, len(stream)) + stream


def frames(record: Array) -> Iterator[tuple[int, Array]]:
    """The runs of rows of a tensor's record, as (rows, stream).

    Raises:
        IntegrityError: this is no record.
    """
    if record.dtype != np.uint8 or record.ndim != 1:
        raise IntegrityError("not an undo record (wrong type)")
    position = 0
    while position < record.size:
        if position + _FRAME.size > record.size:
            raise IntegrityError("not an undo record (truncated)")
        rows, length = _FRAME.unpack(record[position : position + _FRAME.size].tobytes())
        position += _FRAME.size
        if position + length > record.size or rows == 0:
            raise IntegrityError("not an undo record (truncated)")
        yield rows, record[position : position + length]
        position += length


def unpack(stream: Array, most: int) -> Array:
    """The residuals of a frame.

    Args:
        stream: uint8.
        most: how many weights there are, and so the longest that the residual can be.

    Raises:
        IntegrityError: this is no packed residual.
    """
    try:
        return residual.decode(stream, most)
    except ValueError as error:
        raise IntegrityError(f"not a residual ({error})") from error


def as_bytes(content: bytes) -> Array:
    """Bytes as an array, (N,) uint8."""
    return np.frombuffer(bytearray(content), np.uint8)


def file_key(name: str) -> str:
    """Under which a small file is kept: names of tensors have no slash, and names of files no colon."""
    return name.replace("/", ":")


def file_name(key: str) -> str:
    """Undo ``file_key``."""
    return key if key == ADDED else key.replace(":", "/")


def added_files(names: Iterable[str]) -> Array:
    """The list of files that the base does not have, as an array."""
    return as_bytes(json.dumps(sorted(names)).encode())


def read_added(tensor: Array) -> list[str]:
    """Undo ``added_files``.

    Raises:
        IntegrityError: this is no such list.
    """
    try:
        names = json.loads(tensor.tobytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"the undo record's list of files is damaged ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise IntegrityError("the undo record's list of files is damaged")
    return names


def packed(parts: Iterable[bytes]) -> Array:
    """Frames, one after the other, as an array."""
    return np.frombuffer(bytearray().join(parts), np.uint8)
