"""Digests: sha256 says "was it tampered with", xxh3_128 "is it the same tensor".

xxh3_128 is fast and not collision-resistant, so it never decides whether to trust anything.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from adaptkit.checkpoint.manifest import TensorRecord
    from adaptkit.checkpoint.reader import TensorFiles
    from adaptkit.numerics.arrays import Values

_CHUNK_BYTES = 4 << 20
_PIECE_BYTES = 1 << 20
"""What is hashed twice should stay in the processor's cache meanwhile."""


def bytes_of(values: "Values") -> memoryview:
    """View elements in memory as bytes, without copying when they are contiguous and on the CPU."""
    import numpy as np  # here, so that verifying, which hashes files, need not wait for it

    from adaptkit.numerics.arrays import as_array

    return np.ascontiguousarray(as_array(values)).reshape(-1).view(np.uint8).data


def fingerprint(values: "Values") -> str:
    """xxh3_128 of the elements' bytes, in hexadecimal; dtype and shape are not part of it."""
    return xxhash.xxh3_128_hexdigest(bytes_of(values))


def fingerprint_in_pieces(files: "TensorFiles", name: str) -> str:
    """The fingerprint of a tensor in a file, read piece by piece."""
    digest, spec = xxhash.xxh3_128(), files.spec(name)
    for start in range(0, spec.nbytes, _CHUNK_BYTES):
        digest.update(bytes_of(files.read_bytes(name, start, min(_CHUNK_BYTES, spec.nbytes - start))))
    return digest.hexdigest()


def file_chunks(path: Path) -> Iterator[bytes]:
    """Read a file piece by piece."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(
    path: Path, parts: Sequence[tuple[int, int]], told: Callable[[int], None]
) -> tuple[int, str, list[str]]:
    """Hash a file and ranges of it, reading each byte once.

    Args:
        path: file.
        parts: (first byte, size in bytes) of each range, in order, none overlapping another.
        told: is given the number of bytes of each piece that was read.

    Returns:
        size: of the file, in bytes.
        sha256: of it.
        digests: xxh3_128 of each range; of what there is of it, if the file ends before.
    """
    sha256, ranges, size = hashlib.sha256(), _Ranges(parts), 0
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            piece = buffer[:count]
            ranges.feed(size, piece)  # takes a thirtieth of the time, as long as the piece is in the cache
            sha256.update(piece)
            size += count
            told(count)
    return size, sha256.hexdigest(), ranges.digests()


class _Ranges:
    """xxh3_128 of ranges of something that comes piece by piece, in order."""

    def __init__(self, parts: Sequence[tuple[int, int]]) -> None:
        self._waiting = deque(parts)
        self._digest, self._done = xxhash.xxh3_128(), list[str]()

    def feed(self, position: int, piece: memoryview) -> None:
        """Take in the piece that begins at a position."""
        end = position + len(piece)
        while self._waiting and self._waiting[0][0] < end:
            start, size = self._waiting[0]
            self._digest.update(piece[max(0, start - position) : start + size - position])
            if start + size > end:
                return
            self._finish()

    def digests(self) -> list[str]:
        """One a range, when all pieces were given."""
        while self._waiting:
            self._finish()
        return self._done

    def _finish(self) -> None:
        self._done.append(self._digest.hexdigest())
        self._digest.reset()
        self._waiting.popleft()


def tensors_root(tensors: "Iterable[TensorRecord]") -> str:
    """One sha256 that binds name, dtype, shape and digest of a set of tensors, whatever files hold them."""
    lines = sorted(f"{t.name} {t.dtype} {list(t.shape)} {t.xxh3_128}\n" for t in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
