"""Write a file front to back past the page cache, and hash it meanwhile.

A checkpoint may be larger than memory, and has to be on the disk before it counts. Through the page cache every byte
would be copied into a page that has to be found, and on a virtual machine often fetched from the host, first; and
other programs would lose theirs. So whole pieces go to the disk from buffers of our own (``O_DIRECT``), one being
filled while others are hashed and written. Where a file system does not know how, the page cache has them.
"""

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import FileIO

_PIECE_BYTES = 2 << 20
"""A multiple of what the blocks of any disk hold; a file that is shorter goes through the page cache."""
_PIECES = 4
"""One that is being filled, one on its way to the disk, and two for when they do not keep step."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A file being written.

    Args:
        file: open for writing, raw and empty; closed by ``close``.
        nbytes: how long it will be.

    Attributes:
        size: bytes so far.
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
        """Take bytes over; they may change as soon as this returns.

        Raises:
            OSError: the disk refused these, or earlier ones.
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
        """Of all bytes, in hexadecimal, once the file is finished."""
        return self._sha256.hexdigest()

    def finish(self) -> None:
        """Write what is left, and wait until all is on the disk.

        Raises:
            OSError: the disk refused something.
        """
        while self._busy:
            self._wait()
        if self._direct:  # what is left is no whole number of blocks
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
        """Wait for the piece that was given away first; for one that failed it stays the first, and fails again."""
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
                # An earlier write was cut short, or the disk wants larger multiples: either is for the page cache.
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._direct = False
                _set_direct(self._file, False)

    def _hash(self, piece: "_Piece") -> None:
        self._sha256.update(piece.content)


class _Piece:
    """A buffer that begins at the beginning of a page."""

    def __init__(self, size: int) -> None:
        import numpy as np  # here, so that what writes nothing need not wait for it

        self._memory = memoryview(mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._as_array = partial(np.frombuffer, dtype=np.uint8)
        self._array = self._as_array(self._memory)
        self._filled = 0
        self.tasks: list[Future[None]] = []

    @property
    def content(self) -> memoryview:
        return self._memory[: self._filled]

    @property
    def is_full(self) -> bool:
        return self._filled == len(self._memory)

    def fill(self, view: memoryview) -> memoryview:
        """Take what there is room for, and return the rest; numpy lets other threads go on meanwhile."""
        taken = min(len(view), len(self._memory) - self._filled)
        self._array[self._filled : self._filled + taken] = self._as_array(view[:taken])
        self._filled += taken
        return view[taken:]

    def empty(self) -> None:
        self._filled = 0


def _set_direct(file: FileIO, direct: bool) -> bool:
    """Let writes go past the page cache, or through it again; returns whether that was possible."""
    if not _O_DIRECT:
        return False
    flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
    try:
        fcntl.fcntl(file.fileno(), fcntl.F_SETFL, flags | _O_DIRECT if direct else flags & ~_O_DIRECT)
    except OSError:
        return False
    return True
