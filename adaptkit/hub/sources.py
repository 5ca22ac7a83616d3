"""Input repositories in huggingface_hub's cache, resolved to commits.

If the Hub refuses or does not answer, the client silently falls back to its cache. So the Hub is asked for the commit
and its files first, and a cached copy is accepted only if it has all of them. In offline mode the cache is used as is.
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

from adaptkit.arguments import AnyPath, as_path
from adaptkit.checkpoint.foreign import VALUE_HEADS, WEIGHTS_BESIDE, is_of_diffusers, refuse_other_weights
from adaptkit.checkpoint.layout import CARD_NAME
from adaptkit.checkpoint.manifest import MANIFEST_NAME, read_manifest
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.side_files import CODE_SUFFIX, LICENCES, READ_SUFFIXES
from adaptkit.errors import NetworkError, UsageError
from adaptkit.hub._client import Hub, Note, connect, no_note
from adaptkit.hub._errors import hub_errors
from adaptkit.hub._fetch import HiddenBar, fetch_into_cache
from adaptkit.hub._remote import REPO_ID, RemoteFile, check_repo_id, commit_of, is_commit, list_tree
from adaptkit.hub.secrets import looks_like_a_token

__all__ = [
    "check_repo_id",
    "check_weights",
    "download",
    "find_cached",
    "find_commit",
    "find_complete",
    "hub_cache",
    "is_commit",
    "note_if_incomplete",
    "resolve_config",
    "resolve_source",
]

_SOURCE = re.compile(rf"({REPO_ID.pattern})(?:@([\w./+-]+))?", re.ASCII)
_BY_SUFFIX = [f"*{suffix}" for suffix in sorted({*READ_SUFFIXES, CODE_SUFFIX})]
_BESIDE = {*WEIGHTS_BESIDE, *VALUE_HEADS}
_WANTED = [*_BY_SUFFIX, *(f"{name}*" for name in LICENCES), CARD_NAME, *sorted(_BESIDE)]  # the last are reported later
# Checkpoints are at the root; consolidated files and subfolders hold copies of the same weights in other formats.
_UNWANTED = ["consolidated*.safetensors", *(f"{name}*/*" for name in LICENCES)]
_UNWANTED += [f"*/{pattern}" for pattern in _BY_SUFFIX if pattern != "*.jinja"]
_STALE_CACHE = "the Hub stopped answering, and huggingface_hub fell back to an older or incomplete copy"


def hub_cache() -> str:
    """Return the path of huggingface_hub's cache."""
    return str(constants.HF_HUB_CACHE)


def resolve_source(source: AnyPath, progress: Progress = no_progress, note: Note = no_note) -> Path:
    """Resolve a command-line input to a local folder.

    Args:
        source: a local path, or ``org/name[@revision]``, which is downloaded into huggingface_hub's cache. An existing
            local path has precedence.
        progress: called with bytes received.
        note: called with a one-line message before a wait.

    Raises:
        UsageError: the source is neither, or the repository has nothing that adaptkit reads.
        CheckpointError: the weights are in an unsupported format.
        ConflictError: the revision names both a branch and a tag, of different commits.
        IntegrityError: a file was damaged in transit, or the manifest is malformed.
        UnsafeInputError: the Hub lists an invalid path.
        AuthenticationError, NetworkError: the Hub refused or did not answer, even if the cache has a copy; in offline
            mode, the cache has none.
    """
    path = as_path(source, "source")
    text = os.fspath(source)  # not a Path's, which drops a final slash
    named = _named(text)
    if os.path.exists(text):  # Path.exists raises if a name is too long, and takes "" for the current folder
        return path
    if named is None:
        hint = "pass a local folder, or org/name[@revision] on the Hub"
        raise UsageError(f"{text}: does not exist", hint=hint)
    with _local_copy_hint(named[1], named[2]):
        return _fetch_repository(connect(note), _absent(text), named[1], named[2], progress)


def _fetch_repository(hub: Hub, what: str, repo_id: str, revision: str | None, progress: Progress) -> Path:
    """Fetch the files of a repository that operations read into huggingface_hub's cache.

    These are the files of a checkpoint or an adapter and, if there is a manifest, all that it lists.

    Args:
        hub: the Hub client.
        what: what is fetched, for error messages.
        repo_id: org/name.
        revision: branch, tag or commit, or None for main.
        progress: called with bytes received.

    Raises:
        UsageError: there is no such revision, or it has nothing that adaptkit reads.
        CheckpointError, ConflictError, IntegrityError, UnsafeInputError, AuthenticationError, NetworkError: see
            ``resolve_source``.
    """
    commit = _asked_commit(hub, what, repo_id, revision)
    tree = list_tree(hub, repo_id, commit) if commit is not None else {}
    if commit is not None:
        check_weights(f"{repo_id}@{commit}", tree)
    folder = fetch_into_cache(hub, what, repo_id, revision, _WANTED, _UNWANTED, progress)
    manifest = read_manifest(folder)
    if manifest is not None:
        listed = [glob.escape(record.path) for record in manifest.files]
        # The folder's name is its commit.
        fetch_into_cache(hub, what, repo_id, folder.name, listed, [], progress)
    if commit not in (None, folder.name) or _missing_files(folder, tree):
        raise NetworkError(f"{what}: {_STALE_CACHE}", hint="run the same command again")
    if commit is None:
        note_if_incomplete(repo_id, folder, hub.note)
    return folder


def note_if_incomplete(repo_id: str, folder: Path, note: Note) -> None:
    """Note that a cached commit may be incomplete, unless the cache shows which files it has.

    A manifest shows that, or the file list that the client stores when it fetches a whole snapshot.
    """
    if read_manifest(folder) is None and not (folder.parents[1] / "trees" / f"{folder.name}.json").exists():
        note(
            f"{repo_id}@{folder.name}: the cache does not say whether it is complete; a tokenizer, say, may be missing"
        )


def check_weights(what: str, tree: Mapping[str, RemoteFile]) -> None:
    """Refuse, before fetching, a commit without readable files or with weights in an unsupported format or place."""
    beside = [path for path in tree if "/" not in path]
    if not any(path.endswith(".safetensors") and path not in _BESIDE and not is_of_diffusers(path) for path in beside):
        refuse_other_weights(what, beside)
        below = min((path for path in tree if "/" in path and path.endswith(".safetensors")), default="")
        if below and MANIFEST_NAME not in tree:
            hint = f"fetch it with `hf download`, and pass its folder {below.rpartition('/')[0]}"
            raise UsageError(f"{what}: has weights only in subfolders, such as {below}", hint=hint)
    if not _wanted(tree):
        raise UsageError(f"{what}: contains nothing that adaptkit reads", hint="check the name and the revision")


def _missing_files(folder: Path, tree: Mapping[str, RemoteFile]) -> list[str]:
    """Return the files of a commit that operations read and a folder lacks, sorted."""
    manifest = read_manifest(folder)
    listed = {record.path for record in manifest.files} & set(tree) if manifest is not None else set()
    return sorted(path for path in {*_wanted(tree), *listed} if not (folder / path).exists())


def _wanted(tree: Mapping[str, RemoteFile]) -> list[str]:
    return list(filter_repo_objects(tree, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))


def resolve_config(text: str, note: Note = no_note) -> Path:
    """Resolve as ``resolve_source`` does, but download only ``config.json`` of a repository.

    Raises:
        UsageError: the text is neither a local folder nor a repository.
        ConflictError, AuthenticationError, NetworkError: see ``resolve_source``.
    """
    named = _named(text)
    if os.path.exists(text) or named is None:
        return resolve_source(text)
    hub, what = connect(note), _absent(text)
    with _local_copy_hint(named[1], named[2]):
        commit = _asked_commit(hub, what, named[1], named[2])
        config = hub.ask(
            what, lambda api: api.hf_hub_download(named[1], "config.json", revision=named[2], tqdm_class=HiddenBar)
        )
        folder = Path(config).parent
        if commit not in (None, folder.name):
            raise NetworkError(f"{what}: {_STALE_CACHE}", hint="run the same command again")
    return folder


def _asked_commit(hub: Hub, what: str, repo_id: str, revision: str | None) -> str | None:
    """Ask the Hub for a revision's commit, since the client could silently use an older one in its cache.

    Returns:
        The commit; None in offline mode.
    """
    return None if constants.HF_HUB_OFFLINE else commit_of(hub, repo_id, revision, what)


def _absent(text: str) -> str:
    return f"{text}: no such local folder, and on the Hub"


@contextmanager
def _local_copy_hint(repo_id: str, revision: str | None) -> Iterator[None]:
    """Extend the hint of a NetworkError: a local folder may have been meant, or a cached copy may suffice."""
    try:
        yield
    except NetworkError as error:
        hint = f"check the path if you mean a local folder; otherwise {error.hint}"
        if not constants.HF_HUB_OFFLINE and find_cached(repo_id, revision) is not None:
            hint += "; or set HF_HUB_OFFLINE=1 to use the copy in huggingface_hub's cache"
        error.advise(hint)
        raise


def _named(text: str) -> re.Match[str] | None:
    """Match ``org/name[@revision]``; None for a text with a token, which must not be sent as part of a name."""
    return None if looks_like_a_token(text) else _SOURCE.fullmatch(text)


def find_commit(repo_id: str, revision: str, note: Note) -> str:
    """Ask the Hub for the commit of a branch or tag; ``note`` is called with a one-line message before a wait.

    Raises:
        ConflictError: the name is both a branch and a tag, of different commits.
        UsageError, AuthenticationError, NetworkError: there is no such revision, or the Hub refused or did not answer.
    """
    return commit_of(connect(note), repo_id, revision)


def download(repo_id: str, commit: str, progress: Progress, note: Note) -> Path:
    """Fetch a commit's files into huggingface_hub's cache, except those already there; return the folder.

    Raises:
        UsageError: there is no such commit, or it has nothing that adaptkit reads.
        CheckpointError, IntegrityError, UnsafeInputError, AuthenticationError, NetworkError: see ``resolve_source``.
    """
    return _fetch_repository(connect(note), f"{repo_id}@{commit}", repo_id, commit, progress)


def find_complete(repo_id: str, commit: str, tree: Mapping[str, RemoteFile]) -> Path | None:
    """Return the folder of a commit in huggingface_hub's cache if it has all files that operations read, else None.

    Args:
        repo_id: org/name.
        commit: the commit.
        tree: its files.
    """
    found = find_cached(repo_id, commit)
    return None if found is None or _missing_files(found, tree) else found


def find_cached(repo_id: str, revision: str | None) -> Path | None:
    """Return a revision's folder in huggingface_hub's cache, which is named by its commit; None if it is absent.

    Raises:
        UsageError: the cache has no place: HF_HOME is not set, and the home folder is unknown.
    """
    with hub_errors(repo_id):
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
