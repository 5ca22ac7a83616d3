"""Write a safetensors file front to back, hashing while writing."""

import hashlib
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

import xxhash

from adaptkit.checkpoint.hashing import bytes_of, file_chunks
from adaptkit.checkpoint.header import TensorSpec, write_header
from adaptkit.checkpoint.layout import resolve_inside
from adaptkit.checkpoint.manifest import FileRecord, TensorRecord
from adaptkit.errors import DISK_HINTS, AdaptkitError

if TYPE_CHECKING:
    from torch import Tensor

_FLUSH_BYTES = 64 << 20
"""How much is written before the disk is sent to work on it, so that little is left to wait for at the end."""


def write_file(folder: Path, name: str, content: bytes) -> FileRecord:
    """Write a small file and make sure that it is on the disk."""
    path = resolve_inside(folder, name)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(name, len(content), hashlib.sha256(content).hexdigest())


def replace_file(path: Path, content: bytes) -> None:
    """Put a small file in the place of what is there; whatever happens, one of both is there and whole."""
    unfinished = f"{path.name}.partial"
    try:
        write_file(path.parent, unfinished, content)
        with disk_errors(path):
            os.replace(path.parent / unfinished, path)
            sync_folder(path.parent)
    finally:
        (path.parent / unfinished).unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it lies in, and make sure that they are on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make sure that what somebody else wrote into a file is on the disk."""
    with disk_errors(path), path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make sure that the entries of a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_file(source: Path, folder: Path, name: str) -> FileRecord:
    """Copy a file piece by piece, and make sure that it is on the disk."""
    digest, size = hashlib.sha256(), 0
    path = resolve_inside(folder, name)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), path.open("wb") as file:
        for chunk in file_chunks(source):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(name, size, digest.hexdigest())


_HASHED_AT_ONCE, _HASHED_LATER = 1 << 16, 4
"""Bytes that are not worth a thread, and how many pieces may wait for one; they stay in memory meanwhile."""


class TensorWriter:
    """Writes one safetensors file; a context manager.

    Tensors must come in the order of ``specs``, each in as many pieces as the caller likes.

    Args:
        folder: where.
        name: of the file.
        specs: everything that the file will hold.
        header: its first bytes, to keep those of another file with the same tensors; made from ``specs`` otherwise.
    """

    def __init__(self, folder: Path, name: str, specs: Sequence[TensorSpec], header: bytes | None = None) -> None:
        self._path, self._name = resolve_inside(folder, name), name
        self._waiting = list(reversed(specs))
        self._header = header if header is not None else write_header(specs)
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._piece_bytes = 0
        self._unflushed = 0
        self._hashing: deque[Future[None]] = deque()
        self._hasher = ThreadPoolExecutor(1)
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._xxh3 = xxhash.xxh3_128()
        self.tensors: list[TensorRecord] = []

    def __enter__(self) -> Self:
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        self._put(memoryview(self._header))
        return self

    def write(self, name: str, piece: "Tensor") -> None:
        """Append a piece of a tensor.

        Raises:
            ValueError: it is not this tensor's turn, or there is too much of it.
        """
        if not self._waiting or self._waiting[-1].name != name:
            raise ValueError(f"{name!r} written out of turn")
        view = bytes_of(piece)
        self._put(view)
        self._xxh3.update(view)
        self._piece_bytes += len(view)
        spec = self._waiting[-1]
        if self._piece_bytes > spec.nbytes:
            raise ValueError(f"{name!r} is longer than its {spec.nbytes} bytes")
        if self._piece_bytes == spec.nbytes:
            self.tensors.append(TensorRecord(name, self._name, spec.dtype, spec.shape, self._xxh3.hexdigest()))
            self._waiting.pop()
            self._piece_bytes = 0
            self._xxh3.reset()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with disk_errors(self._path), self._file:  # closing writes what is buffered
            self._hasher.shutdown()
            self._flusher.shutdown()
            if kind is None:
                if self._flushing is not None:
                    self._flushing.result()
                if self._waiting:
                    raise ValueError(f"{self._waiting[-1].name!r} was not written")
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def record(self) -> FileRecord:
        """Size and sha256 of the finished file."""
        return FileRecord(self._name, self._size, self._sha256.hexdigest())

    def _put(self, view: memoryview) -> None:
        with disk_errors(self._path):
            self._file.write(view)
            self._unflushed += len(view)
            if self._unflushed >= _FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
                if self._flushing is not None:
                    self._flushing.result()  # the disk's errors are raised once
                self._flushing = self._flusher.submit(os.fdatasync, self._file.fileno())
                self._unflushed = 0
        self._size += len(view)
        self._hash(view)

    def _hash(self, view: memoryview) -> None:
        """Hash in a thread of its own: what is written next need not wait for sha256, which is slower than the disk."""
        if len(view) < _HASHED_AT_ONCE and not self._hashing:
            self._sha256.update(view)
            return
        self._hashing.append(self._hasher.submit(self._sha256.update, view))
        while self._hashing and (len(self._hashing) > _HASHED_LATER or self._hashing[0].done()):
            self._hashing.popleft().result()


class DiskError(AdaptkitError):
    """The disk refused a write."""


class disk_errors:  # noqa: N801 - reads as a statement
    """Turn the disk's own errors into one line that says what to do."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError):
            hint = DISK_HINTS.get(error.errno or 0, "")
            hint = hint and f"{hint} and run the same command again: it goes on where it stopped"
            raise DiskError(f"{self._path.name}: cannot write: {error.strerror}", hint) from error
