"""Download an artifact with its manifest, verified before it appears.

The client compares only sizes, so ``pull`` trusts only the manifest's hashes: the files are downloaded to
``<out>.partial/.download/``, compared there, and each is moved into the output only if it matches.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from adaptkit.arguments import AnyPath, as_path, as_text, check_flags, checked_options
from adaptkit.checkpoint.integrity import file_problem
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import JOURNAL_NAME, resolve_inside
from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileRecord, Manifest
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.signing import Trust, check_signature
from adaptkit.checkpoint.writer import sync_file
from adaptkit.errors import IntegrityError, UnsafeInputError, UsageError
from adaptkit.hub.client import Hub, Note, connect, no_note
from adaptkit.hub.download import fetch, fetch_small
from adaptkit.hub.names import check_repo_id
from adaptkit.hub.options import PullOptions
from adaptkit.hub.parts import part_of, select
from adaptkit.hub.repository import FileTree, commit_of, list_tree
from adaptkit.hub.signature import fetch_signature

_DOWNLOADS = ".download"
"""Subfolder of the unfinished output for downloads; the client resumes partial files that it finds there."""


@dataclass(frozen=True)
class PullReport:
    """The downloaded artifact, every byte of it verified.

    Attributes:
        repo_id: the repository.
        commit: commit of the files, 40 hexadecimal digits.
        output: the folder made.
        files: number of files, without the manifest.
        bytes: total size of these files.
        left_out: files of the artifact that were not requested; if there are any, the folder has its own manifest.
        kind: kind of artifact.
        signed: whether the published artifact has a signature.
        signed_by: the key or identity whose signature was verified, if required.
        manifest_sha256: identifies the artifact as published; compare it with a value from a source that you trust.
        tensors_root: hash over the downloaded tensors.
    """

    repo_id: str
    commit: str
    output: str
    files: int
    bytes: int
    left_out: tuple[str, ...]
    kind: str
    signed: bool
    signed_by: str | None
    manifest_sha256: str
    tensors_root: str


def pull(
    repo_id: str,
    output: AnyPath,
    options: PullOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = no_progress,
    note: Note = no_note,
) -> PullReport:
    """Download an artifact and verify it before it appears.

    Args:
        repo_id: org/name[@revision].
        output: folder to make; a killed run resumes where it stopped.
        options: what to download and to require.
        force: replace an existing output that adaptkit made.
        progress: called with bytes received.
        note: called with a one-line message before a wait.

    Raises:
        IntegrityError: there is no manifest, it is not the required one, or a file or signature does not match it.
        UnsafeInputError: the manifest lists paths that no artifact may contain.
        OutputExistsError: the output exists.
        DiskError: there is not enough disk space.
        AuthenticationError, NetworkError, UsageError: the Hub refused, did not answer, or has no such revision.
    """
    check_flags(force=force)
    output = as_path(output, "output")
    options = checked_options(options, PullOptions)
    repo_id, at, revision = as_text(repo_id, "repo_id").partition("@")
    check_repo_id(repo_id)
    if at and options.revision is not None:
        raise UsageError(f"{repo_id}: two revisions are given", hint="give one, after the @ or in the options")
    options = replace(options, revision=revision) if at else options
    check_output(output, force)
    hub = connect(note)
    commit = commit_of(hub, repo_id, options.revision)
    tree = list_tree(hub, repo_id, commit)
    manifest = _fetch_manifest(hub, repo_id, commit, tree)
    manifest.require_sha256(options.manifest_sha256, repo_id)
    _check_paths(manifest, repo_id)
    signature = fetch_signature(hub, repo_id, commit, tree)
    if options.trust is not None:
        _check_signature(f"{repo_id}@{commit}", manifest, signature, options.trust)
    records = select(manifest, options.only)
    part = part_of(manifest, records, options.only)
    _check_tree(part, tree, repo_id)
    with Output(output, [repo_id, commit, part.sha256], force, discards=False) as out:
        _fetch_files(hub, repo_id, commit, manifest, records, out, progress)
        out.publish(part, signature if part == manifest else None)
    return PullReport(
        repo_id=repo_id,
        commit=commit,
        output=str(output),
        files=len(records),
        bytes=sum(record.size for record in records),
        left_out=tuple(record.path for record in manifest.files if record not in records),
        kind=manifest.kind,
        signed=signature is not None,
        signed_by=str(options.trust) if options.trust else None,
        manifest_sha256=manifest.sha256,
        tensors_root=part.tensors_root,
    )


def _fetch_files(
    hub: Hub,
    repo_id: str,
    commit: str,
    manifest: Manifest,
    records: Sequence[FileRecord],
    out: Output,
    progress: Progress,
) -> None:
    """Fetch files of an artifact; each moves into the output only after its hash and tensors match the manifest.

    Raises:
        IntegrityError: a file was damaged in transit, or is not the published one.
        DiskError: there is not enough disk space.
    """
    total = sum(record.size for record in records)
    out.require_space(total)
    absent = [record for record in records if not out.finished(record.path)]
    there = total - sum(record.size for record in absent)
    folder, what = out.folder / _DOWNLOADS, f"{repo_id}@{commit}"
    for record in absent:
        arrived = resolve_inside(folder, record.path)
        if arrived.exists() and file_problem(folder, record):  # the power was cut before it was on the disk
            arrived.unlink()
    if absent:
        names = [record.path for record in absent]
        fetch(hub, what, repo_id, commit, names, lambda done, _: progress(min(there + done, total), total), folder)
    for record in absent:
        tensors = [tensor for tensor in manifest.tensors if tensor.file == record.path]
        arrived, final = resolve_inside(folder, record.path), resolve_inside(out.folder, record.path)
        if problem := file_problem(folder, record, tensors):
            arrived.unlink(missing_ok=True)  # or the next run would take it for a finished download
            raise IntegrityError(
                f"{what}: {problem}; it was damaged in transit, or is not what was published",
                hint="run the same command again",
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        sync_file(arrived)
        os.replace(arrived, final)
        out.add(record, tensors)
    progress(total, total)


def _fetch_manifest(hub: Hub, repo_id: str, commit: str, tree: FileTree) -> Manifest:
    if MANIFEST_NAME not in tree:
        raise IntegrityError(
            f"{repo_id}@{commit}: {MANIFEST_NAME} not found, so its contents cannot be verified",
            hint=f"pass {repo_id} directly to the command that reads it, or download it with `hf download {repo_id}`",
        )
    return Manifest.from_bytes(
        fetch_small(hub, repo_id, commit, MANIFEST_NAME, tree), f"{repo_id}@{commit}: {MANIFEST_NAME}"
    )


def _check_paths(manifest: Manifest, repo_id: str) -> None:
    """Refuse paths that collide with the download's own files or with each other.

    ``Manifest`` refuses paths outside the folder.
    """
    paths = {PurePosixPath(record.path) for record in manifest.files}
    for path in sorted(paths):
        if path.parts[0] in (JOURNAL_NAME, _DOWNLOADS, ".cache") or paths & set(path.parents):
            raise UnsafeInputError(
                f"{repo_id}: the manifest lists {str(path)!r}, which no artifact may contain", hint="do not trust it"
            )


def _check_signature(what: str, manifest: Manifest, signature: bytes | None, trust: Trust) -> None:
    if signature is None:
        raise IntegrityError(f"{what}: is not signed", hint="do not trust it, or pull it without requiring a signature")
    check_signature(manifest.to_bytes(), signature, trust, f"{what}: {SIGNATURE_NAME}")


def _check_tree(manifest: Manifest, tree: FileTree, repo_id: str) -> None:
    """Compare the Hub's sizes and hashes with the manifest before fetching anything."""
    for record in manifest.files:
        remote = tree.get(record.path)
        if remote is None:
            raise IntegrityError(f"{repo_id}: {record.path} is in the manifest but not in the repository", hint=_AGAIN)
        if remote.size != record.size or (remote.lfs is not None and remote.lfs.sha256 != record.sha256):
            raise IntegrityError(f"{repo_id}: {record.path} is not the file that the manifest lists", hint=_AGAIN)


_AGAIN = "ask the publisher to publish it again"
