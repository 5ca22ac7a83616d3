"""The journal of an unfinished output. Its content is untrusted: it may be damaged or made by another program.

One line of JSON is appended at a time; a partial last line, left by a kill or a full disk, is ignored.

{"key", "inputs": [[path, state], ...]}                        first line
{"file": {path, size, sha256}, "tensors": [...], "notes": {}}  one line per finished file
"""

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint._parsed_records import reason, typed
from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.integrity import size_problem
from adaptkit.checkpoint.layout import read_small, resolve_inside
from adaptkit.checkpoint.manifest import FileRecord, TensorRecord
from adaptkit.checkpoint.writer import disk_errors, sync_folder
from adaptkit.errors import AdaptkitError, ConflictError, UsageError


@dataclass(frozen=True)
class Finished:
    """A file that an earlier run completed, its tensors, and the run's notes about it (see ``Output.add``)."""

    record: FileRecord
    tensors: tuple[TensorRecord, ...]
    notes: dict[str, Any]

    def has_size(self, folder: Path) -> bool:
        """Return whether the folder holds a file of this name and size."""
        return not size_problem(folder, self.record)

    def is_unchanged(self, folder: Path) -> bool:
        """Return whether the folder holds the file with the recorded sha256; reads all of it."""
        return self.has_size(folder) and file_sha256(resolve_inside(folder, self.record.path)) == self.record.sha256


@dataclass(frozen=True)
class Journal:
    """The content of a journal.

    Attributes:
        key: hash of the plan that determines the output's bytes.
        inputs: [path, state] pairs of the files read.
        finished: the files completed so far.
    """

    key: str
    inputs: list[Any]
    finished: tuple[Finished, ...]


def lock(path: Path, final: Path) -> int:
    """Lock a journal without waiting, and make it if there is none; keep two processes from writing the same output.

    Args:
        path: of the journal.
        final: the output, for messages.

    Returns:
        A file descriptor, which holds the lock until it is closed.

    Raises:
        ConflictError: another process holds the lock, or has just moved the journal away.
        UsageError: the file system does not support locks.
        DiskError: the journal cannot be opened.
    """
    with disk_errors(path):  # open for writing: network file systems lock no other file exclusively
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
            raise ConflictError(
                f"{final}: another process has just finished writing it", hint="use it, or choose another -o"
            )
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ConflictError(f"{final}: another process is writing it", hint="wait for it to end") from error
        raise UsageError(
            f"{final}: files cannot be locked on its disk ({error.strerror}), so two runs that write it at once would "
            "not notice each other",
            hint="choose an -o on another disk, or enable file locks (flock) on this one",
        ) from error
    except ConflictError:
        os.close(handle)
        raise
    return handle


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line and fsync the file.

    Raises:
        DiskError: the write failed, for example because the disk is full.
    """
    with disk_errors(path), path.open("a") as file:
        is_new = not file.tell()
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
        if is_new:
            sync_folder(path.parent)


def read_journal(path: Path) -> Journal | None:
    """Read a journal, and truncate a partial last line, which a kill or a full disk left.

    Returns:
        Its content; None if it has no complete line.

    Raises:
        ConflictError: it is damaged.
    """
    text = read_small(path)
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is not an object")
        if not lines:
            return None
        first, *others = lines
        return Journal(
            str(first["key"]), list(first.get("inputs", [])), tuple(_finished(path.parent, line) for line in others)
        )
    except (KeyError, TypeError, ValueError, RecursionError, AdaptkitError) as error:
        raise ConflictError(f"{path}: is damaged ({reason(error)})", hint="delete its folder to start over") from error


def _finished(folder: Path, line: Mapping[str, Any]) -> Finished:
    record = typed(FileRecord(**line["file"]))
    resolve_inside(folder, record.path)
    notes = line["notes"]
    if not isinstance(notes, dict):
        raise TypeError(f"notes is {notes!r}")
    return Finished(record, tuple(typed(TensorRecord(**tensor)) for tensor in line["tensors"]), notes)
