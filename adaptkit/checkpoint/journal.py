"""Write an output folder atomically, and resume an interrupted run.

    <out>.partial/                   everything is written here
    <out>.partial/adaptkit-journal.jsonl
        {"key", "inputs": [[path, state], ...]}                        first line: hash of the plan, and files read
        {"file": {path, size, sha256}, "tensors": [...], "notes": {}}  one line per finished file
    <out>.replaced/                  with force, the old output, until the new one is in place
    <out>                            appears by one rename when everything is done; may be an empty folder before

A killed run leaves the partial folder; the same command finds the journal, keeps the files that it lists and writes the
rest. If inputs or options changed, they differ from the journal's, and the folder is emptied and started over. Lines
are appended one at a time; a partial last line, left by a kill or a full disk, is ignored.

A writing process locks the journal, which works across machines on a network file system, too. The journal remains the
same file (it is truncated, never replaced), since a lock belongs to a file and not to its name.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from adaptkit.checkpoint.header import check_regular
from adaptkit.checkpoint.integrity import file_problem, size_problem
from adaptkit.checkpoint.layout import JOURNAL_NAME, read_small, resolve_inside, write_json
from adaptkit.checkpoint.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    FileRecord,
    Manifest,
    TensorRecord,
    reason,
    typed,
)
from adaptkit.checkpoint.place import (
    appear,
    check_output,
    clear,
    clear_all_but,
    is_marker,
    lock_output,
    partial_folder,
    take_permissions,
)
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.writer import (
    TensorWriter,
    copy_file,
    disk_errors,
    make_folder,
    require_free,
    sync_folder,
    write_file,
)
from adaptkit.errors import AdaptkitError, ConflictError, UsageError
from adaptkit.numerics.dtypes import Array, dtype_name
from adaptkit.numerics.spec import TensorSpec

SCRATCH_NAME, SCRATCH_PREFIX = "adaptkit-scratch", "adaptkit-scratch-"
"""Name of the folder, and prefix of the files, for temporary data that is not part of the output."""
_INPUT_ERROR_CODES = (2, 3, 4, 5)
"""Exit codes of errors that only other inputs or other options can fix."""


class Finished(NamedTuple):
    """A file that is complete, its tensors, and the run's notes about it (see ``Output.add``)."""

    record: FileRecord
    tensors: Sequence[TensorRecord]
    notes: Mapping[str, Any]


class Output:
    """A folder being written; a context manager.

    Args:
        final: the folder's final path.
        plan: everything that determines the bytes of the output; if it changed, unfinished work is discarded.
        force: replace an existing output that adaptkit made.
        keeps: called with the locked folder; returns whether its work must not be discarded although the plan changed.
        inputs: the tensors read; if their files changed since an earlier run, unfinished work is discarded, too.
        discards: discard unfinished work after an error that only other inputs or options can fix, since no later run
            can use it; after a disk error, an interruption or a kill it is kept.

    Attributes:
        folder: the temporary folder to write into, ``<out>.partial``.
        files, tensors, notes: what is finished so far.
    """

    def __init__(
        self,
        final: Path,
        plan: Any,
        force: bool = False,
        keeps: Callable[[Path], bool] = lambda folder: False,
        inputs: Sequence[TensorFiles] = (),
        discards: bool = True,
    ) -> None:
        self.final, self.folder = final, partial_folder(final)
        self._journal, self._lock = self.folder / JOURNAL_NAME, -1
        self._inputs = [(files, files.state()) for files in inputs]
        self._key = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        self._force, self._keeps, self._discards = force, keeps, discards
        self._finished: dict[str, Finished] = {}
        self._whole: dict[str, bool] = {}
        self.files: list[FileRecord] = []
        self.tensors: list[TensorRecord] = []
        self.notes: dict[str, Any] = {}

    def __enter__(self) -> Self:
        check_output(self.final, self._force)
        is_new = not os.path.lexists(self.folder)
        if not is_new:
            self._check_own()
        try:
            make_folder(self.folder)
        except OSError as error:
            raise UsageError(f"{self.final}: cannot be written: {error.strerror}", hint="choose another -o") from error
        try:
            if is_new:
                take_permissions(self.folder, self.final, added=stat.S_IRWXU)
            self._lock = lock_output(self._journal, self.final)
            self._resume()
        except BaseException as error:
            if is_new and not isinstance(error, ConflictError):
                self._journal.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty any more
                    self.folder.rmdir()
            self.__exit__()  # Python does not call it when __enter__ raises
            raise
        return self

    def __exit__(self, kind: object = None, error: BaseException | None = None, trace: object = None) -> None:
        is_of_disk = error is not None and isinstance(error.__cause__, OSError)
        code = error.exit_code if isinstance(error, AdaptkitError) and not is_of_disk else None
        if self._discards and code in _INPUT_ERROR_CODES:
            self.discard()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Delete what was written, unless ``keeps`` protects it."""
        if not self._keeps(self.folder):
            clear(self.folder)
            self.__exit__()  # NFS keeps a deleted file under another name in the folder while it is open
            with contextlib.suppress(OSError):  # another process has begun
                self.folder.rmdir()

    def finished(self, *names: str) -> bool:
        """Return whether an earlier run wrote all these files; if so, add them to the output."""
        if not self.is_whole(*names):
            return False
        for name in names:
            self._count(self._finished[name])
        return True

    def is_whole(self, *names: str) -> bool:
        """Return whether an earlier run wrote all these files, and they are unchanged; several threads may ask."""
        for name in names:
            if name not in self._whole:
                done = self._finished.get(name)
                self._whole[name] = done is not None and not file_problem(self.folder, done.record)
        return all(self._whole[name] for name in names)

    def add(self, record: FileRecord, tensors: Sequence[TensorRecord], notes: Mapping[str, Any] | None = None) -> None:
        """Record that a file is complete and on the disk; a resumed run finds its notes in ``self.notes``."""
        self._count(Finished(record, tensors, notes or {}))
        line = {"file": vars(record), "tensors": [vars(tensor) for tensor in tensors], "notes": notes or {}}
        append_line(self._journal, line)

    def _count(self, done: Finished) -> None:
        if not done.record.path.startswith(SCRATCH_PREFIX):
            self.files.append(done.record)
            self.tensors += done.tensors
        self.notes |= done.notes

    def require_space(self, nbytes: int) -> None:
        """Check that the disk has room for an output of this size, of which files that are there take a part.

        If it has not, and there is no file yet, the folder is removed.
        """
        there = sum(done.record.size for done in self._finished.values())
        cut_off = (p.lstat() for p in self.folder.rglob("*") if str(p.relative_to(self.folder)) not in self._finished)
        needed = nbytes - there - sum(512 * state.st_blocks for state in cut_off)
        try:
            require_free(self.folder, needed, f"{self.final}: needs", "free some space, or choose another -o")
        except AdaptkitError:
            if {path.name for path in self.folder.iterdir()} <= {JOURNAL_NAME, SCRATCH_NAME}:
                self.discard()
            raise

    def require_inputs(self) -> None:
        """Check that the files read are as they were when the output was opened; an IntegrityError otherwise."""
        for files, state in self._inputs:
            files.require_state(state)

    @contextlib.contextmanager
    def scratch_folder(self) -> Iterator[Path]:
        """Create an empty temporary folder, even if a killed run left one, and delete it when the block ends."""
        folder = self.folder / SCRATCH_NAME
        with disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write_tensors(
        self, name: str, tensors: Mapping[str, Array], *, listed: bool = True, notes: Mapping[str, Any] | None = None
    ) -> None:
        """Write a safetensors file, wide types first so that all tensors are aligned, and record it as complete.

        Those that are ``listed`` are in the manifest: all but what is not weights of a model or adapter.
        """
        order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
        specs = [TensorSpec(key, dtype_name(tensors[key].dtype), tuple(tensors[key].shape)) for key in order]
        with TensorWriter(self.folder, name, specs) as writer:
            for key in order:
                writer.write(key, tensors[key])
        self.add(writer.record, writer.tensors if listed else (), notes)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file of the output."""
        self.files.append(write_file(self.folder, name, content))

    def copy(self, source: Path, name: str) -> FileRecord:
        """Copy a regular file of any size into the output."""
        check_regular(source)
        self.files.append(copy_file(source, self.folder, name))
        return self.files[-1]

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file of the output."""
        self.write(name, write_json(value))

    def publish(self, manifest: Manifest, signature: bytes | None = None) -> None:
        """Write the manifest and its signature if given, delete files that it does not list, and rename the folder."""
        check_output(self.final, self._force)  # before anything is removed
        own = {MANIFEST_NAME: manifest.to_bytes()} | ({SIGNATURE_NAME: signature} if signature is not None else {})
        keep = {record.path for record in manifest.files}
        keep |= {write_file(self.folder, name, content).path for name, content in own.items()}
        clear_all_but(self.folder, keep)
        for path in (self.folder, *(found for found in self.folder.rglob("*") if found.is_dir())):
            sync_folder(path)
        appear(self.folder, self.final, self._force)

    def _check_own(self) -> None:
        """Refuse to write into a folder that adaptkit did not make, or through a link."""
        paths = (self.folder, *self.folder.rglob("*"))
        found = list(self.folder.iterdir()) if self.folder.is_dir() else paths
        if any(path.is_symlink() for path in paths) or (found and not any(map(is_marker, found))):
            raise ConflictError(
                f"{self.folder}: is in the way, and adaptkit did not make it", hint="move it, or choose another -o"
            )

    def _resume(self) -> None:
        """Take over what the journal lists as finished; start over if it belongs to another plan."""
        journal = read_journal(self._journal)
        plan = {"key": self._key, "inputs": [[str(files.root.resolve()), state] for files, state in self._inputs]}
        if journal is not None and journal[0] == plan:
            there = (done for done in journal[1] if not size_problem(self.folder, done.record))
            self._finished = {done.record.path: done for done in there}
            return
        if journal is not None and not self._force and self._keeps(self.folder):
            raise ConflictError(
                f"{self.folder}: holds unfinished work of a run with other options or inputs",
                hint="use the same options and inputs to resume it, or start over with --force",
            )
        clear(self.folder, but=JOURNAL_NAME)
        os.truncate(self._journal, 0)
        append_line(self._journal, plan)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line and fsync the file; a DiskError if that fails."""
    with disk_errors(path), path.open("a") as file:
        is_new = not file.tell()
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
        if is_new:
            sync_folder(path.parent)


def read_journal(path: Path) -> tuple[dict[str, Any], list[Finished]] | None:
    """Read a journal, whose content is untrusted, and truncate a partial last line.

    Returns:
        The first line, and the finished files; None if it has no complete line.

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
        finished = []
        for line in lines[1:]:
            record, tensors = typed(FileRecord(**line["file"])), [typed(TensorRecord(**t)) for t in line["tensors"]]
            resolve_inside(path.parent, record.path)
            if not isinstance(line["notes"], dict):
                raise TypeError(f"notes is {line['notes']!r}")
            finished.append(Finished(record, tensors, line["notes"]))
        return {"key": str(lines[0]["key"]), "inputs": list(lines[0].get("inputs", []))}, finished
    except (KeyError, TypeError, ValueError, RecursionError, AdaptkitError) as error:
        raise ConflictError(f"{path}: is damaged ({reason(error)})", hint="delete its folder to start over") from error
