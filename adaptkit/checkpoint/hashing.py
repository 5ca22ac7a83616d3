"""Digests: sha256 detects tampering, xxh3_128 identifies equal tensors.

xxh3_128 is fast but not collision-resistant, so it never decides whether to trust anything.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.numerics.dtypes import Array

_CHUNK_BYTES = 4 << 20
_PIECE_BYTES = 1 << 20
"""Small enough that a piece stays in the CPU's cache while it is hashed twice."""


def bytes_of(values: Array) -> memoryview:
    """View elements as bytes, without a copy if they are contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def fingerprint(values: Array) -> str:
    """Return xxh3_128 of the elements' bytes, in hexadecimal; it does not cover dtype and shape."""
    return xxhash.xxh3_128_hexdigest(bytes_of(values))


def fingerprint_in_pieces(files: TensorFiles, name: str) -> str:
    """Return the fingerprint of a tensor in a file, read piece by piece."""
    digest, spec = xxhash.xxh3_128(), files.spec(name)
    for start in range(0, spec.nbytes, _CHUNK_BYTES):
        digest.update(bytes_of(files.read_bytes(name, start, min(_CHUNK_BYTES, spec.nbytes - start))))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(
    path: Path, parts: Sequence[tuple[int, int]], on_read: Callable[[int], None]
) -> tuple[int, str, list[str]]:
    """Return size and sha256 of a file, and the digests of ``Ranges``; each byte is read once.

    ``on_read`` is called with the number of bytes of each piece.
    """
    sha256, ranges, size = hashlib.sha256(), Ranges(parts), 0
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            piece = buffer[:count]
            ranges.feed(size, piece)  # a thirtieth of sha256's time while the piece is in the CPU's cache
            sha256.update(piece)
            size += count
            on_read(count)
    return size, sha256.hexdigest(), ranges.digests()


class Ranges:
    """Computes xxh3_128 of ranges of a stream that arrives piece by piece and may end early.

    Args:
        parts: (first byte, size in bytes) of each range, in order and not overlapping.
    """

    def __init__(self, parts: Sequence[tuple[int, int]]) -> None:
        self._waiting = deque(parts)
        self._digest, self._done = xxhash.xxh3_128(), list[str]()

    def feed(self, position: int, piece: memoryview) -> None:
        """Hash the piece that begins at a position."""
        end = position + len(piece)
        while self._waiting and self._waiting[0][0] < end:
            start, size = self._waiting[0]
            self._digest.update(piece[max(0, start - position) : start + size - position])
            if start + size > end:
                return
            self._finish()

    def digests(self) -> list[str]:
        """Return the digest of each range, after all pieces were fed."""
        while self._waiting:
            self._finish()
        return self._done

    def _finish(self) -> None:
        self._done.append(self._digest.hexdigest())
        self._digest.reset()
        self._waiting.popleft()
