"""The journal of an unfinished output, believed in nothing: it may be damaged, or somebody else's.

It grows by one whole line of JSON at a time, whatever kill or full disk comes in between.

{"key", "inputs": [[path, state], ...]}                       first
{"file": {path, size, sha256}, "tensors": [...], "notes": {}}  one a finished file
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.integrity import size_problem
from adaptkit.checkpoint.layout import read_small, resolve_inside
from adaptkit.checkpoint.manifest import FileRecord, TensorRecord, reason, typed
from adaptkit.checkpoint.writer import disk_errors, sync_folder
from adaptkit.errors import AdaptkitError, CheckpointError, ConflictError


@dataclass(frozen=True)
class Finished:
    """A file that an earlier run completed, the tensors in it, and what else was learnt while making it."""

    record: FileRecord
    tensors: tuple[TensorRecord, ...]
    notes: dict[str, Any]

    def seems_in(self, folder: Path) -> bool:
        """Whether a file of its size is there."""
        return not size_problem(folder, self.record)

    def is_in(self, folder: Path) -> bool:
        """Whether the file is there as it was written, whatever happened since; reads all of it."""
        return self.seems_in(folder) and file_sha256(resolve_inside(folder, self.record.path)) == self.record.sha256


@dataclass(frozen=True)
class Journal:
    """A run: what determines its output, the state of what it reads by path, and what it finished."""

    key: str
    inputs: Mapping[str, Any]
    finished: tuple[Finished, ...]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line, and make sure that it is on the disk.

    Raises:
        DiskError: there is no room for it.
    """
    with disk_errors(path), path.open("a") as file:
        is_new = not file.tell()
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
        if is_new:
            sync_folder(path.parent)


def read_journal(path: Path, repair: bool) -> Journal | None:
    """Read a journal; None if it does not hold a whole line, or a share that was refused has just taken it away.

    Args:
        path: of the journal.
        repair: remove from it what a kill or a full disk cut off.

    Raises:
        ConflictError: it is damaged.
    """
    try:
        text = read_small(path)
    except CheckpointError:
        if path.exists():
            raise
        return None
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text and repair:
        os.truncate(path, len(whole))
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is not an object")
        if not lines:
            return None
        first, *others = lines
        key, inputs = first["key"], {str(where): state for where, state in first.get("inputs", ())}
        return Journal(str(key), inputs, tuple(_finished(path.parent, line) for line in others))
    except (KeyError, TypeError, ValueError, RecursionError, AdaptkitError) as error:
        raise ConflictError(f"{path}: is damaged ({reason(error)})", hint="delete its folder to start over") from error


def _finished(folder: Path, line: Mapping[str, Any]) -> Finished:
    record = typed(FileRecord(**line["file"]))
    resolve_inside(folder, record.path)
    notes = line["notes"]
    if not isinstance(notes, dict):
        raise TypeError(f"notes is {notes!r}")
    return Finished(record, tuple(typed(TensorRecord(**tensor)) for tensor in line["tensors"]), notes)
