"""Repositories that something is made from, in huggingface_hub's cache, found by the commit that a revision is.

The client takes what its cache holds where the Hub refuses or does not answer. So the Hub is asked for the commit and
its files first, and what is in the cache counts only if it is all of that; offline, the cache is what was asked for.
"""

import glob
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from adaptkit.arguments import AnyPath
from adaptkit.checkpoint.adapter_config import WEIGHTS_BESIDE
from adaptkit.checkpoint.layout import CARD_NAME, CODE_SUFFIX, LICENCES, READ_SUFFIXES, refuse_other_weights
from adaptkit.checkpoint.manifest import MANIFEST_NAME, read_manifest
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.errors import NetworkError, UsageError
from adaptkit.hub._client import Hub, Note, connect, no_note
from adaptkit.hub._fetch import Silent, fetch_into_cache
from adaptkit.hub._remote import REPO_ID, RemoteFile, check_repo_id, commit_of, is_commit, list_tree
from adaptkit.hub.secrets import looks_like_a_token

__all__ = [
    "check_repo_id",
    "download",
    "find_cached",
    "find_commit",
    "find_whole",
    "is_commit",
    "resolve_config",
    "resolve_source",
    "size_of",
    "tell_of_parts",
]

_SOURCE = re.compile(rf"({REPO_ID.pattern})(?:@([\w./+-]+))?", re.ASCII)
_BY_SUFFIX = [f"*{suffix}" for suffix in sorted({*READ_SUFFIXES, CODE_SUFFIX})]
_WANTED = [*_BY_SUFFIX, *(f"{name}*" for name in LICENCES), CARD_NAME, *WEIGHTS_BESIDE]  # the last to be refused
# Checkpoints lie at the root; below it are other formats' copies of the same weights, as consolidated files are.
_UNWANTED = ["consolidated*.safetensors", *(f"{name}*/*" for name in LICENCES)]
_UNWANTED += [f"*/{pattern}" for pattern in _BY_SUFFIX if pattern != "*.jinja"]
_SILENT = "the Hub stopped answering, and huggingface_hub fell back to an older or incomplete copy"


def resolve_source(source: AnyPath, progress: Progress = no_progress, note: Note = no_note) -> Path:
    """Turn what a command line names into a local folder.

    Args:
        source: a local path, or ``org/name[@revision]``, which is downloaded into huggingface_hub's cache. A local path
            that exists goes first.
        progress: told of bytes that arrived.
        note: told in a line for people what is waited for.

    Raises:
        UsageError: neither, or there is nothing in it that is read.
        CheckpointError: its weights are of a format that is not read.
        ConflictError: the revision is a branch and a tag, of different commits.
        IntegrityError: something was damaged on the way, or the manifest is malformed.
        UnsafeInputError: the Hub lists a path that no repository has.
        AuthenticationError, NetworkError: the Hub refused or did not answer, whatever the cache holds; offline,
            the cache does not hold it.
    """
    text, path = os.fspath(source), Path(source)
    named = _named(text)
    if os.path.exists(text):  # Path.exists raises where a name is too long, and takes none for the current folder
        return path
    if named is None:
        hint = "pass a local folder, or org/name[@revision] on the Hub"
        raise UsageError(f"{text or repr(text)}: does not exist", hint=hint)
    with _or_here(named[1], named[2]):
        return _fetch_repository(connect(note), _absent(text), named[1], named[2], progress)


def _fetch_repository(hub: Hub, what: str, repo_id: str, revision: str | None, progress: Progress) -> Path:
    """Bring what operations read of a repository into huggingface_hub's cache.

    That is all that its manifest lists; without one, what a checkpoint or an adapter consists of.

    Args:
        hub: where from.
        what: it is about, for errors.
        repo_id: org/name.
        revision: branch, tag or commit, or None for main.
        progress: told of bytes that arrived.

    Raises:
        UsageError: there is no such revision, or nothing in it that is read.
        CheckpointError, ConflictError, IntegrityError, UnsafeInputError, AuthenticationError, NetworkError: as of
            ``resolve_source``.
    """
    commit = _asked_commit(hub, what, repo_id, revision)
    tree = list_tree(hub, repo_id, commit) if commit is not None else {}
    if commit is not None:
        _check_weights(f"{repo_id}@{commit}", tree)
    folder = fetch_into_cache(hub, what, repo_id, revision, _WANTED, _UNWANTED, progress)
    manifest = read_manifest(folder)
    if manifest is not None:
        listed = [glob.escape(record.path) for record in manifest.files]
        # The folder's name is its commit.
        fetch_into_cache(hub, what, repo_id, folder.name, listed, [], progress)
    if commit not in (None, folder.name) or _missing_files(folder, tree):
        raise NetworkError(f"{what}: {_SILENT}", hint="run the same command again")
    if commit is None:
        tell_of_parts(repo_id, folder, hub.note)
    return folder


def tell_of_parts(repo_id: str, folder: Path, note: Note) -> None:
    """Say of a cached commit that it may be a part, if nothing there tells what is all of it.

    That is a manifest, or the list that the client keeps when it fetches more than a file.
    """
    if read_manifest(folder) is None and not (folder.parents[1] / "trees" / f"{folder.name}.json").exists():
        note(
            f"{repo_id}@{folder.name}: the cache does not say whether it is complete; a tokenizer, say, may be missing"
        )


def _check_weights(what: str, tree: Mapping[str, RemoteFile]) -> None:
    """Refuse a commit that holds nothing to read, or weights of another format, which nobody fetches to look at."""
    beside = [path for path in tree if "/" not in path]
    if not any(path.endswith(".safetensors") for path in beside):
        refuse_other_weights(what, beside)
        below = min((path for path in tree if path.endswith(".safetensors")), default="")
        if below and MANIFEST_NAME not in tree:
            hint = f"fetch it with `hf download`, and pass its folder {below.rpartition('/')[0]}"
            raise UsageError(f"{what}: has weights only in subfolders, such as {below}", hint=hint)
    if not _wanted(tree):
        raise UsageError(f"{what}: contains nothing that adaptkit reads", hint="check the name and the revision")


def _missing_files(folder: Path, tree: Mapping[str, RemoteFile]) -> list[str]:
    """What a folder lacks of the files of a commit that operations read."""
    manifest = read_manifest(folder)
    listed = {record.path for record in manifest.files} & set(tree) if manifest is not None else set()
    return sorted(path for path in {*_wanted(tree), *listed} if not (folder / path).exists())


def _wanted(tree: Mapping[str, RemoteFile]) -> list[str]:
    return list(filter_repo_objects(tree, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))


def resolve_config(text: str, note: Note = no_note) -> Path:
    """As ``resolve_source``, but of a repository only ``config.json`` is downloaded.

    Raises:
        UsageError: neither a local folder nor a repository.
        ConflictError, AuthenticationError, NetworkError: as ``resolve_source``.
    """
    named = _named(text)
    if os.path.exists(text) or named is None:
        return resolve_source(text)
    hub, what = connect(note), _absent(text)
    with _or_here(named[1], named[2]):
        commit = _asked_commit(hub, what, named[1], named[2])
        config = hub.ask(
            what, lambda api: api.hf_hub_download(named[1], "config.json", revision=named[2], tqdm_class=Silent)
        )
        folder = Path(config).parent
        if commit not in (None, folder.name):
            raise NetworkError(f"{what}: {_SILENT}", hint="run the same command again")
    return folder


def _asked_commit(hub: Hub, what: str, repo_id: str, revision: str | None) -> str | None:
    """The commit that the Hub gives for a revision, since the client would silently do with an older one in its cache.

    None where the cache is what was asked for.
    """
    return None if constants.HF_HUB_OFFLINE else commit_of(hub, repo_id, revision, what)


def _absent(text: str) -> str:
    return f"{text}: no such local folder, and on the Hub"


@contextmanager
def _or_here(repo_id: str, revision: str | None) -> Iterator[None]:
    """Where the Hub does not answer, a folder may have been meant, or what is in the cache may do."""
    try:
        yield
    except NetworkError as error:
        error.hint = f"check the path if you mean a local folder; otherwise {error.hint}"
        if not constants.HF_HUB_OFFLINE and find_cached(repo_id, revision) is not None:
            error.hint += "; or set HF_HUB_OFFLINE=1 to use the copy in huggingface_hub's cache"
        raise


def _named(text: str) -> re.Match[str] | None:
    """Repository and revision, if a text has their form; a token in it must not become a name in a request."""
    return None if looks_like_a_token(text) else _SOURCE.fullmatch(text)


def find_commit(repo_id: str, revision: str, note: Note) -> str:
    """Ask the Hub which commit a branch or tag stands for; ``note`` is told what is waited for, as in all of these.

    Raises:
        ConflictError: it is both, of different commits.
        UsageError, AuthenticationError, NetworkError: there is no such revision, or the Hub refused or did not answer.
    """
    return commit_of(connect(note), repo_id, revision)


def size_of(repo_id: str, commit: str, note: Note) -> int:
    """The bytes of a commit's files at its root."""
    tree = list_tree(connect(note), repo_id, commit)
    return sum(file.size for path, file in tree.items() if "/" not in path)


def download(repo_id: str, commit: str, progress: Progress, note: Note) -> Path:
    """A commit's files, in huggingface_hub's cache; what is there already is not fetched again.

    Raises:
        UsageError: there is no such commit.
        IntegrityError, UnsafeInputError, AuthenticationError, NetworkError: as ``resolve_source``.
    """
    return _fetch_repository(connect(note), f"{repo_id}@{commit}", repo_id, commit, progress)


def find_whole(repo_id: str, commit: str, note: Note) -> Path | None:
    """What huggingface_hub's cache holds of a commit, if nothing of it would have to be fetched.

    Raises:
        AuthenticationError, NetworkError, UsageError: as ``size_of``.
    """
    found = find_cached(repo_id, commit)
    if found is None or _missing_files(found, list_tree(connect(note), repo_id, commit)):
        return None
    return found


def find_cached(repo_id: str, revision: str | None) -> Path | None:
    """What huggingface_hub's cache holds of a revision, without asking the Hub; its name is the commit."""
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                local_files_only=True,
                library_name="adaptkit",
            )
        )
    except LocalEntryNotFoundError:
        return None
