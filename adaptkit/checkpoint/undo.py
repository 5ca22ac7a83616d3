"""The undo record, which makes a merge reversible bit for bit. Programs that load models ignore its folder.

    adaptkit-undo/shard-00001-of-0000N.safetensors    what is needed to restore the n-th shard of the result
        X             U8   for each changed tensor of the base: frames of (rows u32, length u32, stream), little-endian,
                           one per run of rows; a stream is the residuals as ``numerics.residual`` encodes them
        X:lengths:a   F64  for DoRA: the norms of the rows of W + Δ that adapter number a found
        X:rest             the last rows of a base tensor that has fewer rows in the result, unchanged
        :header       U8   the first bytes of the base's shard
        :version      U8   [1], the version of the frames; missing in version 1, which is not read any more
    adaptkit-undo/files.safetensors                   U8, by name with ``:`` for ``/``: small files of the base that the
                                                       result lacks or has changed; ``:added`` lists files that only
                                                       the result has
    adaptkit-undo/base/...                            if the base was an artifact: its manifest, its signature if it
                                                       has one, and its files that cannot be in the result, such as
                                                       its own undo record
    adaptkit-adapters/1/...                           with --embed-adapter, the adapters themselves

With the record, the merged weight and the adapter's change, the original can be restored; see ``reference.undo``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.errors import IntegrityError
from adaptkit.numerics import residual
from adaptkit.numerics.dtypes import Array

FOLDER = "adaptkit-undo"
FILES_NAME = f"{FOLDER}/files.safetensors"
BASE_PREFIX = f"{FOLDER}/base/"
ADAPTERS_PREFIX = "adaptkit-adapters/"
HEADER = ":header"
VERSION_KEY = ":version"
VERSION = 2
"""Of the records that are written."""
ADDED = ":added"
_FRAME = struct.Struct("<II")


def record_name(number: int, total: int) -> str:
    """Return the name of the record of the number-th of ``total`` shards."""
    return f"{FOLDER}/shard-{number:05d}-of-{total:05d}.safetensors"


def lengths_name(name: str, adapter: int) -> str:
    """Return the name of the row norms that a DoRA adapter found for a tensor."""
    return f"{name}:lengths:{adapter}"


def rest_name(name: str) -> str:
    """Return the name of the last rows of a base tensor that has fewer rows in the result."""
    return f"{name}:rest"


def pack_frame(rows: int, values: Array) -> bytes:
    """Return the frame of a run of rows, given their number and (M,) int64 residuals."""
    stream = residual.encode(values)
    return _FRAME.pack(rows, len(stream)) + stream


def frames(record_bytes: int, read: Callable[[int, int], Array]) -> Iterator[tuple[int, int, int]]:
    """Iterate over the frames of a tensor's record, as (rows, start of the stream, its length).

    ``read`` returns a number of its bytes, from a start on; it is called for the frames' first bytes only.
    """
    position = 0
    while position < record_bytes:
        start = position + _FRAME.size
        if start > record_bytes:
            raise IntegrityError("not an undo record (truncated)")
        rows, length = _FRAME.unpack(read(position, _FRAME.size).tobytes())
        position = start + length
        if position > record_bytes or rows == 0:
            raise IntegrityError("not an undo record (truncated)")
        yield rows, start, length


def check_version(record: TensorFiles) -> None:
    """Refuse a shard's record of another version; an IntegrityError."""
    found = [1]  # the first one does not say it
    if VERSION_KEY in record.tensors:
        found = record.read_bytes(VERSION_KEY, 0, record.spec(VERSION_KEY).nbytes).tolist()
    if found != [VERSION]:
        raise IntegrityError(
            f"{record.root}: the undo record has version {'.'.join(map(str, found[:4]))}; expected {VERSION}",
            hint="unmerge with the version of adaptkit that merged it",
        )


def unpack(stream: Array, most: int) -> Array:
    """Decode the residuals of a frame, uint8: (M,) int64, with M at most ``most``, the number of weights in the run."""
    try:
        return residual.decode(stream, most)
    except ValueError as error:
        raise IntegrityError(f"not a residual ({error})") from error


def as_bytes(content: bytes) -> Array:
    """Copy bytes into a writable array, (N,) uint8."""
    return np.frombuffer(bytearray(content), np.uint8)


def file_key(name: str) -> str:
    """Return the tensor name under which a small file is stored; tensor names have no slash, file names no colon."""
    return name.replace("/", ":")


def file_name(key: str) -> str:
    """Invert ``file_key``."""
    return key if key == ADDED else key.replace(":", "/")


def added_files(names: Iterable[str]) -> Array:
    """Encode the list of files that the base does not have as an array."""
    return as_bytes(json.dumps(sorted(names)).encode())


def read_added(tensor: Array) -> list[str]:
    """Invert ``added_files``."""
    try:
        names = json.loads(tensor.tobytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"the undo record's list of files is damaged ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise IntegrityError("the undo record's list of files is damaged")
    return names
