"""The work folder: caches the steps' outputs by key.

    .adaptkit/hashes.json             cached hashes of sources; see ``sources.Hashes``
    .adaptkit/3f9a1c0b77de/           first digits of a step's key, a hash of its kind, options, inputs and the version
        adapter.json                  the whole key, and what the step ``adapter`` made and measured; a step that makes
                                      no artifact may have had another name then
        adapter/                      the artifact
        adapter.partial/              the unfinished artifact, which the same step resumes

Everything in it can be made again, so it may be deleted at any time.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.integrity import check_artifact, check_names
from adaptkit.checkpoint.layout import resolve_inside, write_json
from adaptkit.checkpoint.manifest import Manifest, require_manifest
from adaptkit.checkpoint.writer import disk_errors, make_folder, replace_file, replaced_name
from adaptkit.errors import ConflictError, IntegrityError, UsageError
from adaptkit.machine import processor_count
from adaptkit.pipeline.recipe import Step
from adaptkit.pipeline.steps._kind import Facts

WORK_NAME = ".adaptkit"
HASHES_NAME = "hashes.json"
_KEY_LETTERS = 12


@dataclass(frozen=True)
class Record:
    """The record of a step with one key.

    Attributes:
        kind: of the step.
        key: all 64 digits.
        outputs: name -> sha256 of the manifest; None while the step is running.
        figure: the main result, as a short phrase.
        facts: further results.
    """

    kind: str
    key: str
    outputs: dict[str, str] | None
    figure: str
    facts: Facts


class WorkFolder:
    """The folder in which steps work and keep their outputs.

    Args:
        root: its path.
        verify: read every byte of kept outputs, not only names and sizes.
    """

    def __init__(self, root: Path, verify: bool = False) -> None:
        self.root = root
        self._verify = verify

    @contextmanager
    def locked(self, *guarded: Path) -> Iterator[None]:
        """Lock the folder against other runs during the block.

        Args:
            guarded: files elsewhere that only runs with this work folder write.

        Raises:
            ConflictError: another run holds the lock.
            UsageError: the path is taken by a file, or the file system does not support locks.
        """
        if os.path.lexists(self.root) and not self.root.is_dir():
            raise UsageError(f"{self.root}: is not a folder", hint="move it, or choose another --work")
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise ConflictError(
                        f"{self.root}: another run is using this work folder",
                        hint="wait for it to end, or choose another --work",
                    ) from error
                raise UsageError(
                    f"{self.root}: cannot be locked on its disk ({error.strerror}), so two runs that use it at once "
                    "would not notice each other",
                    hint="choose a --work on another disk, or enable file locks (flock) on this one",
                ) from error
            self._clear_unfinished_files(guarded)
            yield
        finally:
            os.close(handle)

    def _clear_unfinished_files(self, guarded: tuple[Path, ...]) -> None:
        """Delete temporary files that a killed run left; under the lock, no other run is writing any."""
        records = list(self.root.glob(f"{'[0-9a-f]' * _KEY_LETTERS}/.*.json.*.partial"))
        left = [path for path in records if replaced_name(path.name) != path.name]
        for file in (self.root / HASHES_NAME, *guarded):
            left += [path for path in file.parent.glob(".*.partial") if replaced_name(path.name) == file.name]
        for path in left:
            if path.is_file():
                with suppress(OSError):  # such as on a read-only disk; it does no harm
                    path.unlink()

    def output(self, key: str, name: str) -> Path:
        """Return the path of an artifact."""
        return self.root / key[:_KEY_LETTERS] / name

    def find(self, step: Step, key: str, note: Callable[[str], None]) -> Record | None:
        """Return the record of an earlier run of the step; None if there is none or its outputs have changed."""
        record = self._read(step, key)
        if record is None:
            if self._path(step, key).is_file():
                note(f"{step.name}: the record of an earlier run is damaged; it has to be made again")
            return None
        try:
            found = {name: self._check(self.output(key, name)).sha256 for name in step.makes}
        except IntegrityError as error:
            if record.outputs is not None:  # otherwise the step did not finish
                note(f"{step.name}: {error.message}; it has to be made again")
            return None
        if record.outputs is None:
            # `begin` deleted old outputs, and new ones appear only when complete: the run was killed just before
            # `finish`.
            return Record(step.kind, key, found, "made before", {}) if step.makes else None
        if record.outputs != found:
            note(f"{step.name}: has changed since it was made; it has to be made again")
            return None
        return record

    def begin(self, step: Step, key: str) -> None:
        """Delete what is at the paths of a step's outputs, and then record that the step is running."""
        for name in step.makes:
            folder = self.output(key, name)
            if folder.is_symlink() or folder.exists():
                folder.unlink() if folder.is_symlink() or folder.is_file() else shutil.rmtree(folder)
        self._write(step, Record(step.kind, key, None, "", {}))

    def finish(self, step: Step, key: str, figure: str, facts: Facts) -> Record:
        """Record that a step finished, with the manifests of its outputs."""
        found = {name: require_manifest(self.output(key, name)).sha256 for name in step.makes}
        record = Record(step.kind, key, found, figure, facts)
        self._write(step, record)
        return record

    def nbytes(self, key: str, name: str) -> int:
        """Return the total size of an artifact's files."""
        return sum(record.size for record in require_manifest(self.output(key, name)).files)

    def _check(self, folder: Path) -> Manifest:
        if not folder.is_dir():
            raise IntegrityError(f"{folder} is missing")
        manifest = require_manifest(folder)
        if self._verify:
            check_artifact(folder, manifest, processor_count())
            return manifest
        check_names(folder, manifest)
        for record in manifest.files:
            if resolve_inside(folder, record.path).stat().st_size != record.size:
                raise IntegrityError(f"{folder}: {record.path} has a different size than its manifest says")
        return manifest

    def _read(self, step: Step, key: str) -> Record | None:
        """Read the record of a step; if it makes nothing, its name does not matter, so a finished one of any name."""
        own = self._path(step, key)
        record = self._read_file(own, step, key)
        if step.makes or (record is not None and record.outputs is not None):
            return record
        others = (self._read_file(path, step, key) for path in sorted(own.parent.glob("*.json")) if path != own)
        return next((other for other in others if other is not None and other.outputs is not None), record)

    def _read_file(self, path: Path, step: Step, key: str) -> Record | None:
        """Read a record; None if there is none, it is another's, or it is not as it was written."""
        try:
            content = json.loads(path.read_bytes())
            if content.pop("sha256") != _digest(content):
                return None
            record = Record(**content)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
        return record if (record.kind, record.key) == (step.kind, key) else None

    def _write(self, step: Step, record: Record) -> None:
        path = self._path(step, record.key)
        with disk_errors(path):
            make_folder(path.parent)
        content = asdict(record)
        replace_file(path, write_json(content | {"sha256": _digest(content)}))

    def _path(self, step: Step, key: str) -> Path:
        return self.root / key[:_KEY_LETTERS] / f"{step.name}.json"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(write_json(content)).hexdigest()
