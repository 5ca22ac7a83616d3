"""Compare a folder with its manifest: the exact set of files, their bytes, and every tensor."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adaptkit.checkpoint.hashing import file_sha256, fingerprint
from adaptkit.checkpoint.layout import resolve_inside
from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileRecord, Manifest
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.errors import CheckpointError, IntegrityError


def check_artifact(root: Path, manifest: Manifest, threads: int = 1, progress: Progress = no_progress) -> None:
    """Compare everything: names, then files, then tensors.

    Args:
        root: folder.
        manifest: what it should hold.
        threads: files hashed at a time.
        progress: told of bytes read.

    Raises:
        IntegrityError: a file or tensor is missing, extra, or changed; names it.
    """
    check_names(root, manifest)
    check_files(root, manifest, threads, progress)
    check_tensors(root, manifest)


def check_names(root: Path, manifest: Manifest) -> None:
    """Compare the set of files; a ``.cache`` folder, which download tools leave behind, does not count.

    Raises:
        IntegrityError: a file is missing, or not in the manifest.
    """
    present = {found.relative_to(root).as_posix() for found in _files(root)}
    listed = {record.path for record in manifest.files}
    extra, missing = sorted(present - listed), sorted(listed - present)
    if extra or missing:
        told = [f"{name} is missing" for name in missing] + [f"{name} is not in the manifest" for name in extra]
        raise IntegrityError(f"{root}: {'; '.join(told[:5])}", hint="get the artifact again")


def check_files(root: Path, manifest: Manifest, threads: int = 1, progress: Progress = no_progress) -> None:
    """Compare size and sha256 of every file of the manifest.

    Raises:
        IntegrityError: names every file that differs.
    """
    total, done = sum(record.size for record in manifest.files), 0
    largest_first = sorted(manifest.files, key=lambda record: -record.size)
    problems = []
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda record: file_problem(root, record), largest_first)
        for record, problem in zip(largest_first, found, strict=True):
            problems += [problem] if problem else []
            done += record.size
            progress(done, total)
    if problems:
        raise IntegrityError(f"{root}: {'; '.join(sorted(problems))}", hint="get the artifact again")


def file_problem(root: Path, record: FileRecord) -> str:
    """Compare one file with its record.

    Returns:
        What is wrong with it, in a few words; empty if nothing is.
    """
    path = resolve_inside(root, record.path)
    if not path.is_file():
        return f"{record.path} is not a regular file"
    size = path.stat().st_size
    if size != record.size:
        return f"{record.path} has {size} bytes instead of {record.size}"
    return "" if file_sha256(path) == record.sha256 else f"{record.path} changed (its sha256 differs)"


def check_tensors(root: Path, manifest: Manifest) -> None:
    """Compare the tensors with their fingerprints; to be asked of files whose own bytes are right.

    Raises:
        IntegrityError: a tensor is missing, extra, in another file, or differs.
    """
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


def _files(root: Path) -> Iterator[Path]:
    """Every file below the folder, but the manifest, its signature, and the download tools' ``.cache``."""
    waiting, own = [root], (root / MANIFEST_NAME, root / SIGNATURE_NAME)
    while waiting:
        for found in sorted(waiting.pop().iterdir()):
            if found.is_dir() and not found.is_symlink():
                waiting += [found] if found != root / ".cache" else []
            elif found not in own:
                yield found
