"""The frames of a shard's undo record, in a file until their sizes are known, so that memory does not hold them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO

import numpy as np

from adaptkit.checkpoint.writer import disk_errors
from adaptkit.numerics.arrays import Array


class Frames:
    """Frames by tensor, in a file.

    Args:
        path: of the file; created when there is a frame to write, and not removed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._spans: dict[str, tuple[int, int]] = {}
        self._end = 0

    def begin(self, name: str) -> None:
        """Begin a tensor; frames that are added from now on are its."""
        self._spans[name] = self._end, self._end

    def add(self, name: str, frame: bytes) -> None:
        """Add a frame to the tensor that was begun last.

        Raises:
            DiskError: the disk is full or fails.
        """
        with disk_errors(self._path):
            if self._file is None:
                self._file = self._path.open("w+b")
            self._file.write(frame)
        self._end += len(frame)
        self._spans[name] = self._spans[name][0], self._end

    def take(self) -> dict[str, Array]:
        """Return all frames of every tensor, (N,) uint8, as views of the mapped file, and start over.

        Raises:
            DiskError: the disk is full or fails.
        """
        whole: Array = np.empty(0, np.uint8)
        if self._file is not None:
            with disk_errors(self._path), self._file:
                self._file.flush()
                whole = np.asarray(np.memmap(self._file, np.uint8, mode="c"))  # remains mapped when the file is closed
        found = {name: whole[start:end] for name, (start, end) in self._spans.items()}
        self._file, self._spans, self._end = None, {}, 0
        return found

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what was not written yet is not needed any more
                self._file.close()
