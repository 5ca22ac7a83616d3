"""Write what ``unmerge`` needs: a shard's undo record, gathered in a file meanwhile, and the base's small files."""

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import resolve_inside
from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from adaptkit.checkpoint.writer import disk_errors
from adaptkit.errors import IntegrityError
from adaptkit.numerics.dtypes import Array


class UndoRecord(Mapping[str, Array]):
    """The undo record of a shard: maps names to arrays. Frames, (N,) uint8, are in a file, and mapped when asked for.

    So memory holds them neither while they are gathered nor, but one tensor's, while the record is written.

    Args:
        path: of the file, which is overwritten.
        header: first bytes of the base's shard.
    """

    def __init__(self, path: Path, header: bytes) -> None:
        self._path, self._end = path, 0
        self._spans: dict[str, tuple[int, int]] = {}
        version = bytes([undo.VERSION])
        self.others: dict[str, Array] = {undo.VERSION_KEY: undo.as_bytes(version), undo.HEADER: undo.as_bytes(header)}
        with disk_errors(path):
            self._file = path.open("w+b")

    def add(self, name: str, frame: bytes) -> None:
        """Add a frame to a tensor; its frames follow each other.

        Raises:
            DiskError: the disk is full or fails.
        """
        with disk_errors(self._path):
            self._file.write(frame)
        start, self._end = self._end, self._end + len(frame)
        self._spans[name] = self._spans.get(name, (start, start))[0], self._end

    def __iter__(self) -> Iterator[str]:
        return iter([*self._spans, *self.others])

    def __len__(self) -> int:
        return len(self._spans) + len(self.others)

    def __getitem__(self, name: str) -> Array:
        if name in self.others:
            return self.others[name]
        start, end = self._spans[name]
        with disk_errors(self._path):
            self._file.flush()
            return np.memmap(self._file, np.uint8, "r", start, end - start)

    def close(self) -> None:
        """Close the file; what was not written yet is not needed any more."""
        with contextlib.suppress(OSError):
            self._file.close()


def write_lost(out: Output, lost: Mapping[str, bytes], added: Sequence[str]) -> None:
    """Keep the base's small files that the result lacks or has changed, and the names of those that only it has."""
    tensors = {undo.file_key(name): undo.as_bytes(content) for name, content in lost.items()}
    tensors[undo.ADDED] = undo.added_files(added)
    out.write_tensors(undo.FILES_NAME, tensors, listed=False)


def write_base(out: Output, root: Path, manifest: Manifest, kept: Container[str]) -> None:
    """Copy the base's manifest, its signature, and the files that it lists and that are not kept otherwise.

    Raises:
        IntegrityError: a file does not match the manifest.
    """
    known = {record.path: record.sha256 for record in manifest.files if record.path not in kept}
    signature = [SIGNATURE_NAME] if (root / SIGNATURE_NAME).is_file() else []
    for name in (MANIFEST_NAME, *signature, *known):
        copied = out.copy(resolve_inside(root, name), f"{undo.BASE_PREFIX}{name}")
        if copied.sha256 != known.get(name, copied.sha256):
            raise IntegrityError(f"{root}: {name} does not match the manifest", hint=f"run adaptkit verify {root}")
