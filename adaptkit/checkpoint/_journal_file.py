"""What the journal of an unfinished output says, believed in nothing: it may be damaged, or somebody else's.

{"key", "inputs": [[path, state], ...]}                       first
{"file": {path, size, sha256}, "tensors": [...], "notes": {}}  one a finished file
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.layout import resolve_inside
from adaptkit.checkpoint.lines import read_lines
from adaptkit.checkpoint.manifest import FileRecord, TensorRecord, typed
from adaptkit.errors import AdaptkitError, ConflictError


@dataclass(frozen=True)
class Finished:
    """A file that an earlier run completed, the tensors in it, and what else was learnt while making it."""

    record: FileRecord
    tensors: tuple[TensorRecord, ...]
    notes: dict[str, Any]

    def is_in(self, folder: Path) -> bool:
        """Whether the file is there as it was written, whatever happened since."""
        written = resolve_inside(folder, self.record.path)
        has_size = written.is_file() and written.stat().st_size == self.record.size
        return has_size and file_sha256(written) == self.record.sha256


@dataclass(frozen=True)
class Journal:
    """A run: what determines its output, the state of what it reads by path, and what it finished."""

    key: str
    inputs: Mapping[str, Any]
    finished: tuple[Finished, ...]


def read_journal(path: Path, repair: bool) -> Journal | None:
    """Read a journal; None if it does not hold a whole line.

    Args:
        path: of the journal.
        repair: remove from it what a kill or a full disk cut off.

    Raises:
        ConflictError: it is damaged.
    """
    lines = read_lines(path, repair)
    if not lines:
        return None
    try:
        first, *others = lines
        key, inputs = first["key"], {str(where): state for where, state in first.get("inputs", ())}
        return Journal(str(key), inputs, tuple(_finished(path.parent, line) for line in others))
    except (KeyError, TypeError, ValueError, AdaptkitError) as error:
        raise ConflictError(f"{path}: is damaged ({error})", hint="delete its folder to begin anew") from error


def _finished(folder: Path, line: Mapping[str, Any]) -> Finished:
    record = typed(FileRecord(**line["file"]))
    resolve_inside(folder, record.path)
    notes = line["notes"]
    if not isinstance(notes, dict):
        raise TypeError(f"notes is {notes!r}")
    return Finished(record, tuple(typed(TensorRecord(**tensor)) for tensor in line["tensors"]), notes)
