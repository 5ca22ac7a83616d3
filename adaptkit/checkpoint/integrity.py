"""Compare a folder with its manifest: the set of files, their bytes, and every tensor. Each byte is read once."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from adaptkit.checkpoint.hashing import file_digests, fingerprint_in_pieces
from adaptkit.checkpoint.header import Header, read_header
from adaptkit.checkpoint.layout import CONFIG_NAME, resolve_inside
from adaptkit.checkpoint.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    FileRecord,
    Manifest,
    TensorRecord,
    read_manifest,
)
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import Checkpoint, TensorFiles
from adaptkit.errors import CheckpointError, IntegrityError

_AGAIN = "download or copy the whole artifact again (from the Hub: adaptkit pull)"
_MOVE = "move files that are not in the manifest out of the folder"


class Measured(NamedTuple):
    """The measured content of a file; it has tensors if it was read as safetensors, and is."""

    record: FileRecord
    tensors: tuple[TensorRecord, ...] = ()


def check_artifact(root: Path, manifest: Manifest, threads: int, progress: Progress = no_progress) -> None:
    """Compare names and sizes, then bytes and tensors in a single pass, with ``threads`` files in parallel.

    Raises:
        IntegrityError: a file or tensor is missing, extra, or changed; names it.
    """
    check_names(root, manifest)
    problems = {record.path: size_problem(root, record) for record in manifest.files}
    whole = {record.path: record.size for record in manifest.files if not problems[record.path]}
    found = measure(root, whole, {tensor.file for tensor in manifest.tensors}, threads, progress)
    for record in manifest.files:
        if record.path in found and found[record.path].record != record:
            problems[record.path] = f"{record.path} changed (its sha256 differs)"
    found_problems = sorted(problem for problem in problems.values() if problem)
    if found_problems:
        raise IntegrityError(f"{root}: {first_problems(found_problems)}", hint=_AGAIN)
    _compare_tensors(root, manifest.tensors, (tensor for file in found.values() for tensor in file.tensors))


def check_names(root: Path, manifest: Manifest) -> None:
    """Compare the set of files with the manifest's.

    ``.git`` and ``.gitattributes``, which every clone from the Hub contains, are ignored.

    Raises:
        IntegrityError: a file is missing, or not in the manifest; see ``present_names``.
    """
    present, listed = present_names(root), {record.path for record in manifest.files}
    extra = sorted(name for name in present - listed if name.split("/")[0] not in (".git", ".gitattributes"))
    missing = sorted(listed - present)
    if extra or missing:
        problems = [f"{name} is missing" for name in missing] + [f"{name} is not in the manifest" for name in extra]
        raise IntegrityError(f"{root}: {first_problems(problems)}", hint=_AGAIN if missing else _MOVE)


def first_problems(problems: Sequence[str]) -> str:
    """List the first five problems, and the number of others."""
    shown = "; ".join(problems[:5])
    return f"{shown}; and {len(problems) - 5} more" if len(problems) > 5 else shown


def present_names(root: Path) -> set[str]:
    """Return the relative paths of all files in the folder and its subfolders.

    Excludes the manifest and its signature, which the manifest cannot list, and ``.cache``, left by download tools.
    """
    waiting, own, names = [root], (root / MANIFEST_NAME, root / SIGNATURE_NAME), set()
    while waiting:
        for found in waiting.pop().iterdir():
            if found.is_dir() and not found.is_symlink():
                waiting += [found] if found != root / ".cache" else []
            elif found not in own:
                names.add(found.relative_to(root).as_posix())
    return names


def file_problem(root: Path, record: FileRecord, tensors: Sequence[TensorRecord] = ()) -> str:
    """Compare one file with its record and, if it matches, its tensors with theirs; each byte is read once.

    Returns:
        A phrase that says how the bytes differ; empty if they match. Without ``tensors`` it is read as any file.

    Raises:
        IntegrityError: the bytes match, but a tensor is missing, extra, or differs from its fingerprint.
    """
    problem = size_problem(root, record)
    if problem:
        return problem
    found = measure(root, {record.path: record.size}, [record.path] if tensors else [])[record.path]
    if found.record != record:
        return f"{record.path} changed (its sha256 differs)"
    _compare_tensors(root, tensors, found.tensors)
    return ""


def size_problem(root: Path, record: FileRecord) -> str:
    """Like ``file_problem``, but check only that it is a regular file of the recorded size, without reading it."""
    path = resolve_inside(root, record.path)
    if not path.is_file():
        return f"{record.path} is not a regular file"
    size = path.stat().st_size
    return "" if size == record.size else f"{record.path} has {size} bytes instead of {record.size}"


def read_input_manifest(root: Path) -> Manifest | None:
    """Read the manifest of an input, if it has one, and compare config.json with it; not the weights.

    Raises:
        IntegrityError: they differ, so that the result's manifest would name the wrong parent.
    """
    manifest = read_manifest(root)
    for record in manifest.files if manifest else ():
        if record.path == CONFIG_NAME and (problem := file_problem(root, record)):
            raise IntegrityError(f"{root}: {problem}", hint=f"restore it; for details, run: adaptkit verify {root}")
    return manifest


def differing_header(files: TensorFiles, manifest: Manifest) -> str | None:
    """Return the name of a tensor whose file, dtype or shape is not as the manifest says; None if all are."""
    listed = {(t.name, t.file, t.dtype, t.shape) for t in manifest.tensors}
    found = {(name, at.file, at.spec.dtype, at.spec.shape) for name, at in files.tensors.items()}
    return min(listed ^ found)[0] if listed != found else None


def check_tensors(root: Path, manifest: Manifest | None) -> None:
    """Compare all tensors of a checkpoint, as its index finds them, with their fingerprints, if it has a manifest."""
    if manifest is not None:
        files = Checkpoint(root)
        found = (
            TensorRecord.of(located.spec, fingerprint_in_pieces(files, name), located.file)
            for name, located in files.tensors.items()
        )
        _compare_tensors(root, manifest.tensors, found)


def measure(
    root: Path,
    sizes: Mapping[str, int],
    with_tensors: Iterable[str],
    threads: int = 1,
    progress: Progress = no_progress,
) -> dict[str, Measured]:
    """Read each file once, the largest first, and return its hashes, and tensors of those to read as safetensors.

    Args:
        root: the artifact's folder.
        sizes: maps the path of each file to its expected size in bytes.
        with_tensors: paths of the files to read as safetensors.
        threads: number of files read in parallel.
        progress: called with the number of bytes read.
    """
    total, done, lock, names = sum(sizes.values()), 0, Lock(), set(with_tensors)

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(done, total)

    def work(path: str) -> Measured:
        header = _header(resolve_inside(root, path)) if path in names else None
        tensors = header.tensors if header else ()
        parts = [(position, spec.nbytes) for spec, position in tensors]
        size, sha256, digests = file_digests(resolve_inside(root, path), parts, advance)
        records = (TensorRecord.of(spec, digest, path) for (spec, _), digest in zip(tensors, digests, strict=True))
        return Measured(FileRecord(path, size, sha256), tuple(records))

    largest_first = sorted(sizes, key=lambda path: -sizes[path])
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(largest_first, pool.map(work, largest_first), strict=True))


def _header(path: Path) -> Header | None:
    try:
        return read_header(path)
    except CheckpointError:
        return None  # damaged, or listed in the manifest with tensors that it does not hold


def _compare_tensors(root: Path, tensors: Iterable[TensorRecord], measured: Iterable[TensorRecord]) -> None:
    found: dict[str, TensorRecord] = {}
    for tensor in measured:
        if tensor.name in found:
            both = f"{tensor.file} and {found[tensor.name].file}"
            raise IntegrityError(f"{root}: tensor {tensor.name} is in both {both}", hint=_AGAIN)
        found[tensor.name] = tensor
    for tensor in tensors:
        located = found.pop(tensor.name, None)
        if located is None or (located.file, located.dtype, located.shape) != (tensor.file, tensor.dtype, tensor.shape):
            raise IntegrityError(
                f"{root}: tensor {tensor.name} is not in {tensor.file} as the manifest says", hint=_AGAIN
            )
        if located != tensor:
            raise IntegrityError(f"{root}: tensor {tensor.name} differs from its fingerprint", hint=_AGAIN)
    if found:
        raise IntegrityError(f"{root}: tensor {min(found)} is not in the manifest", hint=_AGAIN)
