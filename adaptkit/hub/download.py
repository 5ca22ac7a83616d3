"""Download: an artifact with its manifest, verified before it appears; or any checkpoint into the Hub's cache.

The client compares sizes only. ``pull`` therefore trusts nothing but the manifest's hashes: every file arrives in
``<out>.partial/.download/``, is compared there, and moves beside the others only when it is right.
"""

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from adaptkit.checkpoint.integrity import check_tensors
from adaptkit.checkpoint.journal import JOURNAL_NAME, Output
from adaptkit.checkpoint.layout import CARD_NAME, CODE_SUFFIX, LICENCES, READ_SUFFIXES
from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, check_sha256, read_manifest
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.signing import Trust, check_signature
from adaptkit.errors import ConflictError, IntegrityError, NetworkError, UnsafeInputError, UsageError
from adaptkit.hub._client import Hub, Note, connect, model_info, no_note
from adaptkit.hub._fetch import DOWNLOADS, Silent, fetch_files, fetch_into_cache, fetch_small
from adaptkit.hub._remote import REPO_ID, RemoteFile, check_repo_id, list_tree
from adaptkit.hub._selection import part_of, select
from adaptkit.hub._signature import fetch_signature
from adaptkit.hub.secrets import looks_like_a_token

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SOURCE = re.compile(rf"({REPO_ID.pattern})(?:@([\w./+-]+))?", re.ASCII)
_BY_SUFFIX = [f"*{suffix}" for suffix in sorted({*READ_SUFFIXES, CODE_SUFFIX})]
_WANTED = [*_BY_SUFFIX, *(f"{name}*" for name in LICENCES), CARD_NAME]
# Checkpoints lie at the root; below it are other formats' copies of the same weights, as consolidated files are.
_UNWANTED = ["consolidated*.safetensors", *(f"{name}*/*" for name in LICENCES)]
_UNWANTED += [f"*/{pattern}" for pattern in _BY_SUFFIX if pattern != "*.jinja"]


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
        check_sha256(self.manifest_sha256)


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
    output: Path,
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
        AuthenticationError, NetworkError, UsageError: the Hub refused, did not answer, or has no such revision.
    """
    options = options or PullOptions()
    check_repo_id(repo_id)
    check_output(output, force)
    hub = connect(note)
    commit = _commit_of(hub, repo_id, options.revision)
    tree = list_tree(hub, repo_id, commit)
    manifest = _fetch_manifest(hub, repo_id, commit, tree)
    _check_manifest(manifest, repo_id, options.manifest_sha256)
    signature = fetch_signature(hub, repo_id, commit, tree)
    if options.trust is not None:
        _check_signature(f"{repo_id}@{commit}", manifest, signature, options.trust)
    records = select(manifest, options.only)
    part = part_of(manifest, records, options.only)
    _check_tree(part, tree, repo_id)
    with Output(output, [repo_id, commit, part.sha256], force) as out:
        fetch_files(hub, repo_id, commit, manifest, records, out, progress)
        check_tensors(out.folder, part)
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


def resolve_source(text: str, progress: Progress = no_progress, note: Note = no_note) -> Path:
    """Turn what a command line names into a local folder.

    Args:
        text: a local path, or ``org/name[@revision]``, which is downloaded into huggingface_hub's cache. A local path
            that exists goes first.
        progress: told of bytes that arrived.
        note: told in a line for people what is waited for.

    Raises:
        UsageError: neither.
        IntegrityError: something was damaged on the way, or the manifest is malformed.
        AuthenticationError, NetworkError: the Hub refused or did not answer.
    """
    path = Path(text)
    named = _named(text)
    if os.path.exists(path):  # Path.exists raises where a name is too long
        return path
    if named is None:
        raise UsageError(f"{text}: does not exist", hint="give a local folder, or org/name[@revision] on the Hub")
    with _or_here():
        return fetch_repository(connect(note), _absent(text), named[1], named[2], progress)


def fetch_repository(hub: Hub, what: str, repo_id: str, revision: str | None, progress: Progress = no_progress) -> Path:
    """Bring what operations read of a repository into huggingface_hub's cache.

    That is all that its manifest lists; without one, what a checkpoint or an adapter consists of.

    Args:
        hub: where from.
        what: it is about, for errors.
        repo_id: org/name.
        revision: branch, tag or commit, or None for main.
        progress: told of bytes that arrived.

    Raises:
        IntegrityError: something was damaged on the way, or the manifest is malformed.
        UsageError, AuthenticationError, NetworkError: there is no such revision, or the Hub refused or did not answer.
    """
    folder = fetch_into_cache(hub, what, repo_id, revision, _WANTED, _UNWANTED, progress)
    manifest = read_manifest(folder)
    if manifest is not None:
        listed = [glob.escape(record.path) for record in manifest.files]
        # The folder's name is its commit.
        fetch_into_cache(hub, what, repo_id, folder.name, listed, [], progress)
    return folder


def resolve_config(text: str, note: Note = no_note) -> Path:
    """As ``resolve_source``, but of a repository only ``config.json`` is downloaded.

    Raises:
        UsageError: neither a local folder nor a repository.
        AuthenticationError, NetworkError: the Hub refused or did not answer.
    """
    named = _named(text)
    if os.path.exists(text) or named is None:
        return resolve_source(text)
    with _or_here():
        config = connect(note).ask(
            _absent(text),
            lambda api: api.hf_hub_download(named[1], "config.json", revision=named[2], tqdm_class=Silent),
        )
    return Path(config).parent


def _absent(text: str) -> str:
    return f"{text}: no such folder here, and on the Hub"


@contextmanager
def _or_here() -> Iterator[None]:
    """Where the Hub does not answer, a folder may have been meant."""
    try:
        yield
    except NetworkError as error:
        error.hint = f"check the path if a folder is meant; else {error.hint}"
        raise


def _named(text: str) -> re.Match[str] | None:
    """Repository and revision, if a text has their form; a token in it must not become a name in a request."""
    return None if looks_like_a_token(text) else _SOURCE.fullmatch(text)


def _commit_of(hub: Hub, repo_id: str, revision: str | None) -> str:
    """Find the commit of a revision; a name that is a branch and a tag of different commits names neither."""
    if revision and not _COMMIT.fullmatch(revision):
        refs = hub.ask(repo_id, lambda api: api.list_repo_refs(repo_id))
        found = {ref.target_commit for ref in (*refs.branches, *refs.tags) if ref.name == revision}
        if len(found) > 1:
            raise ConflictError(
                f"{repo_id}: {revision} is both a branch and a tag there, of different commits",
                hint=f"name the commit: {' or '.join(sorted(found))}",
            )
    what = f"{repo_id}@{revision}" if revision else repo_id
    commit = str(hub.ask(what, lambda api: model_info(api, repo_id, revision)).sha)
    if not _COMMIT.fullmatch(commit) or (_COMMIT.fullmatch(revision or "") and commit != revision):
        raise NetworkError(f"{what}: the Hub answers with commit {commit!r}", hint="try again later")
    return commit


def _fetch_manifest(hub: Hub, repo_id: str, commit: str, tree: Mapping[str, RemoteFile]) -> Manifest:
    if MANIFEST_NAME not in tree:
        raise IntegrityError(
            f"{repo_id}@{commit}: there is no {MANIFEST_NAME}, so nothing says what it should hold",
            hint=f"give {repo_id} itself to the command that reads it, or download it with `hf download {repo_id}`",
        )
    return Manifest.from_bytes(fetch_small(hub, repo_id, commit, MANIFEST_NAME, tree[MANIFEST_NAME]))


def _check_manifest(manifest: Manifest, repo_id: str, expected_sha256: str | None) -> None:
    """Refuse another artifact than the one expected, and what would get in the way of the download itself.

    ``Manifest`` refuses paths out of the folder.
    """
    if expected_sha256 is not None and manifest.sha256 != expected_sha256:
        raise IntegrityError(
            f"{repo_id}: the manifest's sha256 is {manifest.sha256}, not {expected_sha256}",
            hint="this is another artifact than the one that you expect",
        )
    paths = {PurePosixPath(record.path) for record in manifest.files}
    for path in sorted(paths):
        if path.parts[0] in (JOURNAL_NAME, DOWNLOADS, ".cache") or paths & set(path.parents):
            raise UnsafeInputError(
                f"{repo_id}: the manifest lists {str(path)!r}, which no artifact has", hint="do not trust it"
            )


def _check_signature(what: str, manifest: Manifest, signature: bytes | None, trust: Trust) -> None:
    if signature is None:
        raise IntegrityError(f"{what}: is not signed", hint="do not trust it, or pull it without a key")
    with TemporaryDirectory(prefix="adaptkit-pull-") as folder:
        file = Path(folder) / SIGNATURE_NAME
        file.write_bytes(signature)
        check_signature(manifest.to_bytes(), file, trust)


def _check_tree(manifest: Manifest, tree: Mapping[str, RemoteFile], repo_id: str) -> None:
    """Compare what the Hub says of its files with the manifest, before gigabytes are fetched in vain."""
    for record in manifest.files:
        remote = tree.get(record.path)
        if remote is None:
            raise IntegrityError(f"{repo_id}: {record.path} is in the manifest but not in the repository", hint=_AGAIN)
        if remote.size != record.size or remote.sha256 not in (None, record.sha256):
            raise IntegrityError(f"{repo_id}: {record.path} is not the file that the manifest lists", hint=_AGAIN)


_AGAIN = "ask whoever published it to publish it again"
