"""The undo record: what makes a merge reversible to the last bit.

    adaptkit-undo-00001-of-0000N.safetensors     beside the n-th merged shard, one tensor per changed weight:
    X.weight   U8   a zlib stream: the number M of ambiguous weights (little-endian int64), their residuals in a byte
                    each, and for every byte that is -128 the true residual (int64)

Together with the merged weight and the adapter's delta this restores the original; see ``reference.undo``.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

from adaptkit.errors import IntegrityError

_ESCAPE = -128
_LEVEL = 6


def undo_name(number: int, total: int) -> str:
    """Name of the record for the number-th of ``total`` shards."""
    return f"adaptkit-undo-{number:05d}-of-{total:05d}.safetensors"


def pack(residual: Tensor) -> Tensor:
    """Compress a residual.

    Args:
        residual: (M,) int64.

    Returns:
        uint8, at least one.
    """
    values = residual.numpy()
    large = np.abs(values) >= -_ESCAPE
    small = np.where(large, _ESCAPE, values).astype(np.int8)
    count = np.array([values.size], dtype="<i8")
    stream = count.tobytes() + small.tobytes() + values[large].astype("<i8").tobytes()
    return torch.frombuffer(bytearray(zlib.compress(stream, _LEVEL)), dtype=torch.uint8)


def unpack(packed: Tensor, most: int) -> Tensor:
    """Undo ``pack``.

    Args:
        packed: uint8.
        most: how many weights there are, and so the longest that the residual can be.

    Raises:
        IntegrityError: this is no packed residual.
    """
    limit = 8 + 9 * most
    inflate = zlib.decompressobj()
    try:
        stream = inflate.decompress(packed.numpy().tobytes(), limit)
    except zlib.error as error:
        raise IntegrityError(f"not a residual ({error})") from error
    if not inflate.eof or len(stream) < 8:
        raise IntegrityError("not a residual (wrong length)")
    count = int(np.frombuffer(stream, "<i8", 1)[0])
    if not 0 <= count <= most or len(stream) < 8 + count:
        raise IntegrityError("not a residual (wrong length)")
    small = np.frombuffer(stream, np.int8, count, offset=8)
    large = small == _ESCAPE
    if len(stream) != 8 + count + 8 * int(large.sum()):
        raise IntegrityError("not a residual (wrong length)")
    values = small.astype(np.int64)
    values[large] = np.frombuffer(stream, "<i8", offset=8 + count)
    return torch.from_numpy(values)
