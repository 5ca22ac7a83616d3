"""Repositories that something is made from, found by the commit that a revision stands for."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from adaptkit.checkpoint.manifest import read_manifest
from adaptkit.hub._client import connect, model_info
from adaptkit.hub._remote import check_repo_id, list_tree
from adaptkit.hub.download import _UNWANTED, _WANTED, fetch_repository

__all__ = ["check_repo_id", "download", "find_cached", "find_commit", "find_whole", "is_commit", "size_of"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit, which never moves."""
    return _COMMIT.fullmatch(revision) is not None


def find_commit(repo_id: str, revision: str) -> str:
    """Ask the Hub which commit a branch or tag stands for.

    Raises:
        UsageError, AuthenticationError, NetworkError: there is no such revision, or the Hub refused or did not answer.
    """
    return connect().ask(f"{repo_id}@{revision}", lambda api: str(model_info(api, repo_id, revision).sha))


def size_of(repo_id: str, commit: str) -> int:
    """The bytes of a commit's files at its root."""
    tree = list_tree(connect(), repo_id, commit)
    return sum(file.size for path, file in tree.items() if "/" not in path)


def download(repo_id: str, commit: str) -> Path:
    """A commit's files, in huggingface_hub's cache; what is there already is not fetched again.

    Raises:
        UsageError, AuthenticationError, NetworkError: there is no such commit, or the Hub refused or did not answer.
    """
    return fetch_repository(connect(), f"{repo_id}@{commit}", repo_id, commit)


def find_whole(repo_id: str, commit: str) -> Path | None:
    """What huggingface_hub's cache holds of a commit, if nothing of it would have to be fetched.

    Raises:
        AuthenticationError, NetworkError, UsageError: as ``size_of``.
    """
    found = find_cached(repo_id, commit)
    if found is None:
        return None
    manifest = read_manifest(found)
    tree = list_tree(connect(), repo_id, commit)
    listed = {record.path for record in manifest.files} if manifest is not None else set()
    wanted = filter_repo_objects(tree, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    return found if all((found / path).exists() for path in {*wanted, *(listed & set(tree))}) else None


def find_cached(repo_id: str, revision: str) -> Path | None:
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
