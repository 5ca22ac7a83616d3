"""An output folder that appears whole or not at all, and a run that can be continued.

    <out>.partial/                   everything is written here
    <out>.partial/adaptkit-journal.jsonl   first line {"key"}, then one line per finished file
    <out>.replaced/                  with force, the old output, for the moment until the new one is in its place
    <out>                            appears by one rename when all is done

A killed run leaves the partial folder; the same command finds the journal, keeps the files that it lists and
writes the rest. If inputs or options changed, the key differs and the folder is begun anew.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from adaptkit.checkpoint.layout import write_json
from adaptkit.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, TensorRecord
from adaptkit.checkpoint.writer import write_file
from adaptkit.errors import ConflictError, OutputExistsError, UsageError

JOURNAL_NAME = "adaptkit-journal.jsonl"
_PARTIAL, _REPLACED = ".partial", ".replaced"


class Output:
    """A folder being written; a context manager.

    Args:
        final: where the folder will appear.
        plan: everything that determines the bytes of the output; a changed plan begins anew.
        force: replace an existing output that adaptkit made.
        keep_work: refuse, instead of beginning anew, when the plan changed: what lies there took long to make.

    Attributes:
        folder: where to write meanwhile.
        files, tensors, notes: what is finished so far.

    Raises:
        OutputExistsError: ``final`` exists, and ``force`` is not given or it is no artifact of adaptkit.
        ConflictError: another process is writing it.
    """

    def __init__(self, final: Path, plan: Any, force: bool = False, keep_work: bool = False) -> None:
        self.final = final
        self.folder = final.with_name(final.name + _PARTIAL)
        self._key = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        self._force = force
        self._keep_work = keep_work
        self._finished: dict[str, tuple[FileRecord, list[TensorRecord], dict[str, Any]]] = {}
        self.files: list[FileRecord] = []
        self.tensors: list[TensorRecord] = []
        self.notes: dict[str, Any] = {}

    def __enter__(self) -> Self:
        check_output(self.final, self._force)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.final}: cannot be written: {error.strerror}", hint="choose another -o") from error
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ConflictError(f"{self.final}: another process is writing it", hint="wait for that one") from error
        try:
            self._resume()
        except BaseException:
            os.close(self._lock)  # __exit__ is not called
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def finished(self, *names: str) -> bool:
        """Whether an earlier run wrote all these files; they then count as part of the output."""
        if not all(name in self._finished for name in names):
            return False
        for name in names:
            record, tensors, notes = self._finished[name]
            self.files.append(record)
            self.tensors += tensors
            self.notes |= notes
        return True

    def add(self, record: FileRecord, tensors: Sequence[TensorRecord], notes: Mapping[str, Any] | None = None) -> None:
        """Note that a file is complete and on the disk.

        Args:
            record: the file.
            tensors: in it.
            notes: what else was learnt while making it; a run that goes on finds it in ``self.notes``.
        """
        self.files.append(record)
        self.tensors += tensors
        self.notes |= notes or {}
        self._append({"file": asdict(record), "tensors": [asdict(t) for t in tensors], "notes": notes or {}})

    def write(self, name: str, content: bytes) -> None:
        """Write a small file of the output."""
        self.files.append(write_file(self.folder, name, content))

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file of the output."""
        self.write(name, write_json(value))

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest, remove what is no part of the artifact, and rename the folder into view."""
        write_file(self.folder, MANIFEST_NAME, manifest.to_bytes())
        keep = {record.path for record in manifest.files} | {MANIFEST_NAME}
        for path in sorted(self.folder.iterdir()):
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        os.fsync(self._lock)
        check_output(self.final, self._force)
        replaced = _replaced(self.final)
        if self.final.exists():
            if replaced.exists():  # left by a run that was killed here
                shutil.rmtree(replaced)
            self.final.rename(replaced)
        self.folder.rename(self.final)
        _sync_folder(self.final.parent)
        if replaced.exists():
            shutil.rmtree(replaced)

    def _resume(self) -> None:
        path = self.folder / JOURNAL_NAME
        lines = _journal_lines(path)
        if not lines or lines[0] != {"key": self._key}:
            self._begin(changed=bool(lines))
            return
        for line in lines[1:]:
            record = FileRecord(**line["file"])
            written = self.folder / record.path
            if written.is_file() and written.stat().st_size == record.size:
                self._finished[record.path] = (
                    record,
                    [TensorRecord(**tensor) for tensor in line["tensors"]],
                    line["notes"],
                )

    def _begin(self, changed: bool) -> None:
        found = sorted(self.folder.iterdir())
        ours = any((self.folder / name).is_file() for name in (JOURNAL_NAME, MANIFEST_NAME))
        if found and not changed and not ours:
            raise ConflictError(
                f"{self.folder}: is in the way and not adaptkit's", hint="move it, or choose another -o"
            )
        if changed and self._keep_work and not self._force:
            raise ConflictError(
                f"{self.folder}: holds unfinished work of a run with other options or inputs",
                hint="run it with the same options to go on, or begin anew with --force",
            )
        for old in found:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        self._append({"key": self._key})

    def _append(self, line: dict[str, Any]) -> None:
        with (self.folder / JOURNAL_NAME).open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def check_output(final: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output that exists, unless it may be replaced, and one that would replace or change an input.

    Raises:
        OutputExistsError: it exists and is not to be, or must not be, replaced.
        ConflictError: a foreign folder lies where the old output would be put aside.
        UsageError: the name is one that unfinished work has, or none; or the output is, holds, or is in an input.
    """
    if final.name in ("", ".."):
        raise UsageError(f"{final}: has no name of its own", hint="name the folder to make: -o out")
    if os.path.lexists(final) and not force:
        raise OutputExistsError(f"{final}: exists already", hint="choose another -o, or replace it with --force")
    whole = Path(os.path.realpath(final))
    for path in inputs:
        source = Path(os.path.realpath(path))
        inside = whole != source and whole.is_relative_to(source)
        if inside or (force and source.is_relative_to(whole)):
            raise UsageError(f"{final}: the output would change its own input {path}", hint="choose another -o")
    if final.name.endswith((_PARTIAL, _REPLACED)):
        raise UsageError(
            f"{final}: names in {_PARTIAL} and {_REPLACED} are for unfinished work", hint="choose another -o"
        )
    aside = _replaced(final)
    if os.path.lexists(aside) and (aside.is_symlink() or not (aside / MANIFEST_NAME).is_file()):
        raise ConflictError(f"{aside}: is in the way and not adaptkit's", hint="move it, or choose another -o")
    if os.path.lexists(final) and (final.is_symlink() or not (final / MANIFEST_NAME).is_file()):
        raise OutputExistsError(f"{final}: adaptkit did not make this, so --force does not replace it")


def _journal_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal; what a kill cut off is removed from the file."""
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ConflictError(f"{path}: is damaged ({error})", hint="delete its folder to begin anew") from error


def _replaced(final: Path) -> Path:
    """Where an output that is being replaced waits until the new one is in its place."""
    return final.with_name(final.name + _REPLACED)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
