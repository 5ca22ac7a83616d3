"""Input repositories in huggingface_hub's cache, resolved to commits.

If the Hub refuses or does not answer, the client silently falls back to its cache. So the Hub is asked for the commit
and its files first, and a cached copy is accepted only if it has all of them. In offline mode the cache is used as is.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from adaptkit.arguments import AnyPath, as_path
from adaptkit.checkpoint.foreign import VALUE_HEADS, WEIGHTS_BESIDE, is_of_diffusers, refuse_other_weights
from adaptkit.checkpoint.layout import CARD_NAME, CONFIG_NAME
from adaptkit.checkpoint.manifest import MANIFEST_NAME, read_manifest
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.side_files import CODE_SUFFIX, LICENCES, READ_SUFFIXES
from adaptkit.errors import NetworkError, UsageError
from adaptkit.hub.client import Hub, Note, connect, no_note
from adaptkit.hub.client_errors import client_errors, offline_error
from adaptkit.hub.download import fetch_into_cache
from adaptkit.hub.names import REPO_ID
from adaptkit.hub.repository import FileTree, commit_of, list_tree
from adaptkit.hub.secrets import looks_like_a_token

_SOURCE = re.compile(rf"({REPO_ID.pattern})(?:@([\w./+-]+))?", re.ASCII)
_BY_SUFFIX = [f"*{suffix}" for suffix in sorted({*READ_SUFFIXES, CODE_SUFFIX})]
_BESIDE = {*WEIGHTS_BESIDE, *VALUE_HEADS}
_WANTED = [*_BY_SUFFIX, *(f"{name}*" for name in LICENCES), CARD_NAME, *sorted(_BESIDE)]  # the last are reported later
# Checkpoints are at the root; consolidated files and subfolders hold copies of the same weights in other formats.
_UNWANTED = ["consolidated*.safetensors", *(f"{name}*/*" for name in LICENCES)]
_UNWANTED += [f"*/{pattern}" for pattern in _BY_SUFFIX if pattern != "*.jinja"]


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
    return _resolve(source, None, progress, note)


def resolve_config(source: AnyPath, note: Note = no_note) -> Path:
    """Resolve as ``resolve_source`` does, but download only ``config.json`` of a repository."""
    return _resolve(source, [CONFIG_NAME], no_progress, note)


def _resolve(source: AnyPath, only: Collection[str] | None, progress: Progress, note: Note) -> Path:
    path = as_path(source, "source")
    text = os.fspath(source)  # not a Path's, which drops a final slash
    # A text with a token must not be sent as part of a name.
    named = None if looks_like_a_token(text) else _SOURCE.fullmatch(text)
    if os.path.exists(text):  # Path.exists raises if a name is too long, and takes "" for the current folder
        return path
    if named is None:
        raise UsageError(f"{text}: does not exist", hint="pass a local folder, or org/name[@revision] on the Hub")
    what = f"{text}: no such local folder, and on the Hub"
    try:
        return _fetch(connect(note), what, named[1], named[2], only, progress)
    except NetworkError as error:
        cached = "" if constants.HF_HUB_OFFLINE else "; or set HF_HUB_OFFLINE=1, if huggingface_hub's cache has a copy"
        error.advise(f"check the path if you mean a local folder; otherwise {error.hint}{cached}")
        raise


def _fetch(
    hub: Hub, what: str, repo_id: str, revision: str | None, only: Collection[str] | None, progress: Progress
) -> Path:
    """Fetch files of a repository into huggingface_hub's cache, or find them there in offline mode.

    Args:
        hub: the Hub client.
        what: what is fetched, for error messages.
        repo_id: org/name.
        revision: branch, tag or commit, or None for main.
        only: names of the files; None for all that operations read: those of a checkpoint or an adapter and, if there
            is a manifest, all that it lists.
        progress: called with bytes received.
    """
    if constants.HF_HUB_OFFLINE:
        cached = find_cached(repo_id, revision, only)
        if cached is None or not all((cached / name).exists() for name in only or ()):
            raise offline_error(what)
        if only is None:
            note_if_incomplete(repo_id, cached, hub.note)
        return cached
    commit = commit_of(hub, repo_id, revision, what)
    tree = list_tree(hub, repo_id, commit, what)
    if only is None:
        _check_weights(f"{repo_id}@{commit}", tree)
    elif absent := sorted(set(only) - set(tree)):
        raise UsageError(f"{repo_id}@{commit}: has no {absent[0]}", hint="check the name and the revision")
    names = set(_wanted(tree) if only is None else only)
    folder = fetch_into_cache(hub, what, repo_id, revision, commit, [tree[name] for name in sorted(names)], progress)
    further = _listed(folder, tree) - names if only is None else None
    if further:
        fetch_into_cache(hub, what, repo_id, commit, commit, [tree[name] for name in sorted(further)], progress)
    return folder


def note_if_incomplete(repo_id: str, folder: Path, note: Note) -> None:
    """Note that a cached commit may be incomplete, unless the cache shows which files it has.

    A manifest shows that, or the file list that the client stores when it fetches a whole snapshot.
    """
    if read_manifest(folder) is None and not (folder.parents[1] / "trees" / f"{folder.name}.json").exists():
        note(
            f"{repo_id}@{folder.name}: the cache does not say whether it is complete; a tokenizer, say, may be missing"
        )


def _check_weights(what: str, tree: FileTree) -> None:
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


def _wanted(tree: FileTree) -> list[str]:
    return list(filter_repo_objects(tree, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))


def _listed(folder: Path, tree: FileTree) -> set[str]:
    """Return the files of a commit that its manifest lists, if it has one."""
    manifest = read_manifest(folder)
    return {record.path for record in manifest.files} & set(tree) if manifest is not None else set()


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
    return _fetch(connect(note), f"{repo_id}@{commit}", repo_id, commit, None, progress)


def find_complete(repo_id: str, commit: str, note: Note) -> tuple[Path | None, int]:
    """Return the folder of a commit in huggingface_hub's cache if it has all files that operations read, else None.

    Returns:
        The folder, and the size of the files at the commit's root; in the client's offline mode any folder, and 0.

    Raises:
        UsageError, CheckpointError: there is no such commit, or it has nothing that adaptkit reads.
        UnsafeInputError, AuthenticationError, NetworkError: see ``resolve_source``.
    """
    cached = find_cached(repo_id, commit)
    if constants.HF_HUB_OFFLINE:
        return cached, 0
    tree = list_tree(connect(note), repo_id, commit)
    _check_weights(f"{repo_id}@{commit}", tree)
    nbytes = sum(file.size for path, file in tree.items() if "/" not in path)
    if cached is None or not all((cached / name).exists() for name in {*_wanted(tree), *_listed(cached, tree)}):
        return None, nbytes
    return cached, nbytes


def find_cached(repo_id: str, revision: str | None, only: Collection[str] | None = None) -> Path | None:
    """Return a revision's folder in huggingface_hub's cache, which is named by its commit; None if it is absent.

    It is absent, too, if the client knows that files are missing that operations read, or that are in ``only``.
    """
    with client_errors(repo_id):
        try:
            return Path(
                snapshot_download(
                    repo_id,
                    revision=revision,
                    allow_patterns=_WANTED if only is None else list(only),
                    ignore_patterns=_UNWANTED,
                    local_files_only=True,
                    library_name="adaptkit",
                )
            )
        except LocalEntryNotFoundError:
            return None
