"""Download an artifact with its manifest, verified before it appears.

The client compares sizes only. ``pull`` therefore trusts nothing but the manifest's hashes: every file arrives in
``<out>.partial/.download/``, is compared there, and moves beside the others only when it is right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adaptkit.arguments import AnyPath, texts
from adaptkit.checkpoint.journal import JOURNAL_NAME, Output
from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, check_sha256
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.signing import Trust, check_signature
from adaptkit.errors import IntegrityError, UnsafeInputError, UsageError
from adaptkit.hub._client import Hub, Note, connect, no_note
from adaptkit.hub._fetch import DOWNLOADS, fetch_files, fetch_small
from adaptkit.hub._remote import RemoteFile, check_repo_id, commit_of, list_tree
from adaptkit.hub._selection import part_of, select
from adaptkit.hub._signature import fetch_signature


@dataclass(frozen=True)
class PullOptions:
    """What of an artifact is wanted, and what it has to be.

    Attributes:
        revision: branch, tag or commit; main if None.
        only: parts of the artifact, see ``_selection``; all of it if empty.
        manifest_sha256: what the manifest's sha256 must be, in lower-case hexadecimal.
        trust: whose signature it must have.
    """

    revision: str | None = None
    only: Sequence[str] = ()
    manifest_sha256: str | None = None
    trust: Trust | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "only", texts(self.only))
        check_sha256(self.manifest_sha256)
        if self.revision == "":
            raise UsageError("revision: is empty", hint="use a branch, tag or commit, or leave it out for main")


@dataclass(frozen=True)
class PullReport:
    """What arrived, every byte of it verified.

    Attributes:
        repo_id: the repository.
        commit: it came from, 40 hexadecimal digits.
        output: folder.
        files: besides the manifest.
        bytes: in them.
        left_out: files of the artifact that were not asked for; the folder then has a manifest of its own.
        kind: of artifact.
        signed: whether it has a signature.
        signed_by: whose signature was found right, if that was asked for.
        manifest_sha256: names the artifact as published; compare it with one from a source that you trust.
        tensors_root: binds the tensors that arrived.
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
        repo_id: org/name.
        output: folder to make; a killed run goes on where it stopped.
        options: what is wanted.
        force: replace an existing output that adaptkit made.
        progress: told of bytes that arrived.
        note: told in a line for people what is waited for.

    Raises:
        IntegrityError: there is no manifest, it is another one, or something is not what it says.
        UnsafeInputError: the manifest names files that no artifact has.
        OutputExistsError: the output exists.
        DiskError: its disk has no room for it.
        AuthenticationError, NetworkError, UsageError: the Hub refused, did not answer, or has no such revision.
    """
    output = Path(output)
    options = options or PullOptions()
    check_repo_id(repo_id)
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
    with Output(output, [repo_id, commit, part.sha256], force) as out:
        fetch_files(hub, repo_id, commit, manifest, records, out, progress)
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


def _fetch_manifest(hub: Hub, repo_id: str, commit: str, tree: Mapping[str, RemoteFile]) -> Manifest:
    if MANIFEST_NAME not in tree:
        raise IntegrityError(
            f"{repo_id}@{commit}: {MANIFEST_NAME} not found, so its contents cannot be verified",
            hint=f"pass {repo_id} directly to the command that reads it, or download it with `hf download {repo_id}`",
        )
    return Manifest.from_bytes(
        fetch_small(hub, repo_id, commit, MANIFEST_NAME, tree[MANIFEST_NAME]), f"{repo_id}@{commit}: {MANIFEST_NAME}"
    )


def _check_paths(manifest: Manifest, repo_id: str) -> None:
    """Refuse what would get in the way of the download itself.

    ``Manifest`` refuses paths out of the folder.
    """
    paths = {PurePosixPath(record.path) for record in manifest.files}
    for path in sorted(paths):
        if path.parts[0] in (JOURNAL_NAME, DOWNLOADS, ".cache") or paths & set(path.parents):
            raise UnsafeInputError(
                f"{repo_id}: the manifest lists {str(path)!r}, which no artifact may contain", hint="do not trust it"
            )


def _check_signature(what: str, manifest: Manifest, signature: bytes | None, trust: Trust) -> None:
    if signature is None:
        raise IntegrityError(f"{what}: is not signed", hint="do not trust it, or pull it without requiring a signature")
    check_signature(manifest.to_bytes(), signature, trust, f"{what}: {SIGNATURE_NAME}")


def _check_tree(manifest: Manifest, tree: Mapping[str, RemoteFile], repo_id: str) -> None:
    """Compare what the Hub says of its files with the manifest, before gigabytes are fetched in vain."""
    for record in manifest.files:
        remote = tree.get(record.path)
        if remote is None:
            raise IntegrityError(f"{repo_id}: {record.path} is in the manifest but not in the repository", hint=_AGAIN)
        if remote.size != record.size or remote.sha256 not in (None, record.sha256):
            raise IntegrityError(f"{repo_id}: {record.path} is not the file that the manifest lists", hint=_AGAIN)


_AGAIN = "ask the publisher to publish it again"
