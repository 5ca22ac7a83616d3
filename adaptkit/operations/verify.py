"""Check an artifact against its manifest: the exact files, their bytes, and every tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adaptkit.checkpoint.hashing import file_sha256, fingerprint
from adaptkit.checkpoint.layout import require_folder, resolve_inside
from adaptkit.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, require_manifest
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.errors import CheckpointError, IntegrityError
from adaptkit.operations._pipeline import Progress, in_order, no_progress, thread_count


@dataclass(frozen=True)
class VerifyReport:
    """What was found right.

    Attributes:
        path: folder.
        kind: of artifact.
        files: compared by size and sha256.
        tensors: compared by name, type, shape and fingerprint.
        bytes: read.
        tensors_root: binds the tensors.
        manifest_sha256: names the artifact; compare it with one from a source that you trust.
    """

    path: str
    kind: str
    files: int
    tensors: int
    bytes: int
    tensors_root: str
    manifest_sha256: str


def verify(
    path: Path,
    *,
    manifest_sha256: str | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Check every byte of an artifact.

    Args:
        path: folder.
        manifest_sha256: what the manifest's own sha256 must be, in lower-case hexadecimal.
        threads: files hashed at a time; one per processor if None.
        progress: told of bytes read.

    Raises:
        IntegrityError: a file or tensor is missing, extra, or changed; names it.
    """
    manifest = require_manifest(require_folder(path))
    if manifest_sha256 is not None and manifest.sha256 != manifest_sha256:
        raise IntegrityError(
            f"{path}: the manifest's sha256 is {manifest.sha256}, not {manifest_sha256}",
            hint="this is another artifact than the one that you expect",
        )
    _check_names(path, manifest)
    total, done = sum(record.size for record in manifest.files), 0
    largest_first = sorted(manifest.files, key=lambda record: -record.size)
    problems = []
    for record, problem in zip(
        largest_first, in_order(lambda r: _file_problem(path, r), largest_first, thread_count(threads)), strict=True
    ):
        problems += [problem] if problem else []
        done += record.size
        progress(done, total)
    if problems:
        raise IntegrityError(f"{path}: {'; '.join(sorted(problems))}", hint="get the artifact again")
    _check_tensors(path, manifest)
    return VerifyReport(
        path=str(path),
        kind=manifest.kind,
        files=len(manifest.files),
        tensors=len(manifest.tensors),
        bytes=total,
        tensors_root=manifest.tensors_root,
        manifest_sha256=manifest.sha256,
    )


def _check_names(path: Path, manifest: Manifest) -> None:
    present = {found.relative_to(path).as_posix() for found in _walk(path)}
    listed = {record.path for record in manifest.files}
    extra, missing = sorted(present - listed), sorted(listed - present)
    if extra or missing:
        told = [f"{name} is missing" for name in missing] + [f"{name} is not in the manifest" for name in extra]
        raise IntegrityError(f"{path}: {'; '.join(told[:5])}", hint="get the artifact again")


def _walk(path: Path) -> Iterator[Path]:
    for found in sorted(path.iterdir()):
        if found.is_dir() and not found.is_symlink():
            if not (found.name == ".cache" and found.parent == path):
                yield from _walk(found)
        elif found.name != MANIFEST_NAME:
            yield found


def _file_problem(root: Path, record: FileRecord) -> str:
    path = resolve_inside(root, record.path)
    if not path.is_file():
        return f"{record.path} is not a regular file"
    size = path.stat().st_size
    if size != record.size:
        return f"{record.path} has {size} bytes instead of {record.size}"
    return "" if file_sha256(path) == record.sha256 else f"{record.path} changed (its sha256 differs)"


def _check_tensors(root: Path, manifest: Manifest) -> None:
    """Compare the tensors with their fingerprints; the files' own bytes are right already."""
    try:
        files = TensorFiles(root, sorted({tensor.file for tensor in manifest.tensors}))
    except CheckpointError as error:
        raise IntegrityError(f"{root}: {error.message}", error.hint) from error
    for tensor in manifest.tensors:
        located = files.tensors.get(tensor.name)
        if located is None or (located.file, located.spec.dtype, located.spec.shape) != (
            tensor.file,
            tensor.dtype,
            tensor.shape,
        ):
            raise IntegrityError(f"{root}: tensor {tensor.name} is not in {tensor.file} as the manifest says")
        if fingerprint(files.read(tensor.name)) != tensor.xxh3_128:
            raise IntegrityError(f"{root}: tensor {tensor.name} differs from its fingerprint")
    unlisted = sorted(set(files.tensors) - {tensor.name for tensor in manifest.tensors})
    if unlisted:
        raise IntegrityError(f"{root}: tensor {unlisted[0]} is not in the manifest")
