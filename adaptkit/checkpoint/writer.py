"""Write safetensors files sequentially, hashing while writing; write small files and folders durably."""

import contextlib
import glob
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import xxhash

from adaptkit.checkpoint.direct import DirectFile
from adaptkit.checkpoint.hashing import Ranges, bytes_of
from adaptkit.checkpoint.header import write_header
from adaptkit.checkpoint.layout import resolve_inside
from adaptkit.checkpoint.manifest import FileRecord, TensorRecord
from adaptkit.errors import DISK_HINTS, AdaptkitError, CheckpointError
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.spec import TensorSpec

_TEMPORARY = re.compile(r"\.(?P<name>.+?)(\.\d{1,9}\.\d+)?\.partial")
"""Name of a temporary file of ``replace_file``; older versions wrote no process and thread ids."""
_CHUNK_BYTES = 4 << 20
_STALE_SECONDS = 3600
"""Age above which a temporary file must be left over from a killed process, possibly on another machine."""


def write_file(folder: Path, name: str, content: bytes) -> FileRecord:
    """Write a small file and fsync it."""
    path = resolve_inside(folder, name)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(path, content)
    return FileRecord(name, len(content), hashlib.sha256(content).hexdigest())


def replace_file(path: Path, content: bytes) -> None:
    """Atomically replace a small file: at any time either the old or the new content exists in full.

    Safe for concurrent writers: each uses its own temporary file, and deletes old ones that killed processes left.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_synced(unfinished, content)
            os.replace(unfinished, path)
            for other in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
                with contextlib.suppress(FileNotFoundError):  # its writer has just finished
                    if replaced_name(other.name) == path.name and time.time() - other.stat().st_mtime > _STALE_SECONDS:
                        other.unlink()
            sync_folder(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)


def replaced_name(name: str) -> str:
    """Return the final name for a temporary file of ``replace_file``; other names are returned unchanged."""
    temporary = _TEMPORARY.fullmatch(name)
    return temporary["name"] if temporary else name


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, and fsync the entries."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Fsync a file that other code wrote."""
    with disk_errors(path), path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Fsync the entries of a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_file(source: Path, folder: Path, name: str, ranges: Ranges | None = None) -> FileRecord:
    """Copy a file piece by piece to ``name`` in a folder, and fsync it; ``ranges`` is fed with the bytes.

    Raises:
        CheckpointError: the source cannot be read.
        DiskError: the copy cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    path = resolve_inside(folder, name)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for chunk in _chunks_of(source):
                file.write(chunk)
                digest.update(chunk)
                if ranges is not None:
                    ranges.feed(size, memoryview(chunk))
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    return FileRecord(name, size, digest.hexdigest())


def _chunks_of(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}", hint="check its permissions") from error


class TensorWriter:
    """Writes one safetensors file; a context manager.

    Tensors must be written in the order of ``specs``, each in any number of pieces. ``header`` is the first bytes of
    another file with the same tensors, to reuse them; None to make them from ``specs``.
    """

    def __init__(self, folder: Path, name: str, specs: Sequence[TensorSpec], header: bytes | None = None) -> None:
        self._path, self._name = resolve_inside(folder, name), name
        self._waiting = list(reversed(specs))
        self._header = header if header is not None else write_header(specs)
        self._nbytes = len(self._header) + sum(spec.nbytes for spec in specs)
        self._piece_bytes = 0
        self._xxh3 = xxhash.xxh3_128()
        self.tensors: list[TensorRecord] = []

    def __enter__(self) -> Self:
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = DirectFile(self._path.open("wb", buffering=0), self._nbytes)
        try:
            self._put(memoryview(self._header))
        except BaseException:
            self._file.close()
            raise
        return self

    def write(self, name: str, piece: Array) -> None:
        """Append a piece of the tensor that is next; a ValueError if it is another, or longer than its tensor."""
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
            self.tensors.append(TensorRecord.of(spec, self._xxh3.hexdigest(), self._name))
            self._waiting.pop()
            self._piece_bytes = 0
            self._xxh3.reset()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with disk_errors(self._path), contextlib.closing(self._file):
            if kind is None:
                if self._waiting:
                    raise ValueError(f"{self._waiting[-1].name!r} was not written")
                self._file.finish()

    @property
    def record(self) -> FileRecord:
        """Size and sha256 of the finished file."""
        return FileRecord(self._name, self._file.size, self._file.sha256())

    def _put(self, view: memoryview) -> None:
        with disk_errors(self._path):
            self._file.append(view)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class DiskError(AdaptkitError):
    """A write to the disk failed."""


def require_free(folder: Path, nbytes: int, what: str, hint: str) -> None:
    """Check that the disk of a folder, which need not exist yet, has enough free space; a DiskError otherwise.

    ``what`` is subject and verb of the message, such as "out: needs".
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if nbytes > free:
        raise DiskError(f"{what} {nbytes:,} more bytes, but its disk has {free:,} free", hint=hint)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert an OSError in the block into a DiskError with a hint."""
    try:
        yield
    except OSError as error:
        hint = DISK_HINTS.get(error.errno or 0, "")
        hint = hint and f"{hint}; then run the same command again to resume"
        raise DiskError(f"{path}: cannot write: {error.strerror}", hint) from error
