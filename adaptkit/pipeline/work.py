"""The work folder: caches the steps' outputs by key.

    .adaptkit/hashes.json             cached hashes of sources; see ``sources.Hashes``
    .adaptkit/3f9a1c0b77de/           first digits of a step's key, a hash of its kind, options, inputs and the version
        adapter.json                  the whole key, and what the step ``adapter`` made and measured
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import adaptkit
from adaptkit.checkpoint.integrity import check_artifact, check_names
from adaptkit.checkpoint.layout import name_of, resolve_inside, write_json
from adaptkit.checkpoint.manifest import Manifest, require_manifest
from adaptkit.checkpoint.writer import disk_errors, make_folder, replace_file
from adaptkit.errors import ConflictError, IntegrityError, UsageError
from adaptkit.machine import processor_count
from adaptkit.pipeline.recipe import Step
from adaptkit.pipeline.sources import StepInput
from adaptkit.pipeline.steps._kind import Facts

WORK_NAME = ".adaptkit"
HASHES_NAME = "hashes.json"
_KEY_LETTERS = 12
_KEY_SCHEMA = 3


@dataclass(frozen=True)
class Record:
    """The record of a step with one key.

    Attributes:
        kind: of the step.
        key: all 64 digits.
        outputs: name -> sha256 of the manifest.
        figure: the main result, as a short phrase.
        facts: further results.
    """

    kind: str
    key: str
    outputs: dict[str, str]
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
    def locked(self) -> Iterator[None]:
        """Lock the folder against other runs during the block.

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
                    problem = f"{self.root}: another run is using this work folder"
                    raise ConflictError(problem, hint="wait for it to end, or choose another --work") from error
                problem = f"{self.root}: its disk does not support locks ({error.strerror})"
                raise UsageError(
                    problem, hint="choose a --work on another disk, or enable flock on this one"
                ) from error
            yield
        finally:
            os.close(handle)

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
            note(f"{step.name}: {error.message}; it has to be made again")
            return None
        if record.outputs != found:
            note(f"{step.name}: has changed since it was made; it has to be made again")
            return None
        return record

    def begin(self, step: Step, key: str) -> None:
        """Delete what is at the paths of a step's record and outputs; what is unfinished stays, to be resumed."""
        for path in (self._path(step, key), *(self.output(key, name) for name in step.makes)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

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
        """Read the record of a step; None if there is none, or it is not as it was written."""
        try:
            content = json.loads(self._path(step, key).read_bytes())
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


def step_key(step: Step, materials: Mapping[str, StepInput]) -> str | None:
    """Hash a step's kind and options, adaptkit's version, and the content of its inputs.

    Args:
        step: of a recipe.
        materials: maps names to materials, as far as they are known.

    Returns:
        64 hexadecimal digits; None if an input is not known yet.
    """
    inputs = []
    for taken, name in step.takes():
        material = materials.get(name)
        if material is None or material.digest is None or material.path is None:
            return None
        # A folder's name may be written into an artifact made from it; only the suffix of a file's name matters.
        called = name_of(material.path) if taken.takes != "file" else material.path.suffix
        inputs.append([taken.key, called, material.digest])
    counted = {name: value for name, value in asdict(step.options).items() if name not in step.how.not_in_key}
    document = {
        "schema": _KEY_SCHEMA,
        "adaptkit": adaptkit.__version__,
        "kind": step.kind,
        "options": counted,
        "inputs": inputs,
        "makes": list(step.makes),
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(write_json(content)).hexdigest()
