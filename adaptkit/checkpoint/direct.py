"""Write a file sequentially with direct I/O, bypassing the page cache, and hash it at the same time.

A checkpoint may be larger than memory, and must be on the disk before it counts as written. Through the page cache,
every byte would be copied into a page that must first be allocated (on a virtual machine often from the host), and
other programs' pages would be evicted. So full buffers are written directly (``O_DIRECT``): one is filled while others
are hashed and written. On file systems without ``O_DIRECT``, writes go through the page cache.
"""

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO

import numpy as np

_PIECE_BYTES = 2 << 20
"""Buffer size: a multiple of any disk's block size. Shorter files go through the page cache."""
_PIECES = 4
"""Number of buffers: one being filled, one being written, and two to absorb speed differences."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A file being written.

    Args:
        file: unbuffered, open for writing, and empty; closed by ``close``.
        nbytes: its final size.

    Attributes:
        size: number of bytes appended so far.
    """

    def __init__(self, file: FileIO, nbytes: int) -> None:
        self._file = file
        self._direct = nbytes >= _PIECE_BYTES and _set_direct(file, True)
        self._free = deque(_Piece(min(_PIECE_BYTES, nbytes)) for _ in range(min(_PIECES, 1 + nbytes // _PIECE_BYTES)))
        self._busy: deque[_Piece] = deque()
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._sha256 = hashlib.sha256()
        self.size = 0

    def append(self, view: memoryview) -> None:
        """Append a copy of the bytes; the caller may reuse them as soon as this returns.

        Raises:
            OSError: writing these or earlier bytes failed.
        """
        self.size += len(view)
        while len(view):
            piece = self._free[0] if self._free else self._wait()
            view = piece.fill(view)
            if piece.is_full:
                self._free.popleft()
                piece.tasks = [self._writer.submit(self._write, piece), self._hasher.submit(self._hash, piece)]
                self._busy.append(piece)

    def sha256(self) -> str:
        """Return the sha256 of the finished file, in hexadecimal."""
        return self._sha256.hexdigest()

    def finish(self) -> None:
        """Write the rest, and wait until everything is on the disk.

        Raises:
            OSError: a write failed.
        """
        while self._busy:
            self._wait()
        if self._direct:  # the rest is not a whole number of blocks
            self._direct = not _set_direct(self._file, False)
        for piece in self._free:
            self._write(piece)
            self._hash(piece)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, finished or not."""
        with self._file:
            self._writer.shutdown(cancel_futures=True)
            self._hasher.shutdown(cancel_futures=True)
            self._free.clear()
            self._busy.clear()

    def _wait(self) -> "_Piece":
        """Wait for the oldest busy buffer and return it empty; one that failed stays in place and raises again."""
        piece = self._busy[0]
        for task in piece.tasks:
            task.result()
        self._busy.popleft()
        piece.empty()
        self._free.append(piece)
        return piece

    def _write(self, piece: "_Piece") -> None:
        view = piece.content
        while len(view):
            try:
                view = view[self._file.write(view) :]
            except OSError as error:
                # A short write left the position unaligned, or the disk has larger blocks: use the page cache from now.
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._direct = False
                _set_direct(self._file, False)

    def _hash(self, piece: "_Piece") -> None:
        self._sha256.update(piece.content)


class _Piece:
    """A page-aligned buffer."""

    def __init__(self, size: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._array = np.frombuffer(self._memory, np.uint8)
        self._filled = 0
        self.tasks: list[Future[None]] = []

    @property
    def content(self) -> memoryview:
        return self._memory[: self._filled]

    @property
    def is_full(self) -> bool:
        return self._filled == len(self._memory)

    def fill(self, view: memoryview) -> memoryview:
        """Copy as much as fits, and return the rest; numpy releases the GIL during the copy."""
        taken = min(len(view), len(self._memory) - self._filled)
        self._array[self._filled : self._filled + taken] = np.frombuffer(view[:taken], np.uint8)
        self._filled += taken
        return view[taken:]

    def empty(self) -> None:
        self._filled = 0


def _set_direct(file: FileIO, direct: bool) -> bool:
    """Switch direct I/O on or off, and return whether that was possible."""
    if not _O_DIRECT:
        return False
    flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
    try:
        fcntl.fcntl(file.fileno(), fcntl.F_SETFL, flags | _O_DIRECT if direct else flags & ~_O_DIRECT)
    except OSError:
        return False
    return True
