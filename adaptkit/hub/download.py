"""Downloading files of a commit with the client, which resumes, and compares sizes only.

So each file that it fetches into its cache is compared once with the hash that the Hub lists, and removed if it
differs. What the cache already holds is taken as it is; ``hf cache verify`` compares that.
"""

import glob
import os
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from adaptkit.checkpoint.layout import MAX_SMALL_FILE_BYTES
from adaptkit.checkpoint.progress import Progress
from adaptkit.errors import IntegrityError, NetworkError
from adaptkit.hub.client import Hub
from adaptkit.hub.repository import FileTree, is_intact


class HiddenBar(tqdm):
    """The client's progress bar, always disabled; the client would show one on any terminal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]


class _Stop(BaseException):
    """Stops the client after a progress callback raised; a BaseException, so it is neither translated nor retried."""


def fetch(
    hub: Hub,
    what: str,
    repo_id: str,
    revision: str | None,
    names: Collection[str],
    progress: Progress,
    folder: Path | None = None,
) -> Path:
    """Fetch files into the client's cache, or into a folder, in which files of an interrupted try are resumed.

    Args:
        hub: the Hub client.
        what: what is fetched, for error messages.
        repo_id: org/name.
        revision: branch, tag or commit, or None for main.
        names: paths of the files.
        progress: called with (bytes received, total bytes); the total grows while the client starts further files.
            An exception that it raises leaves this function unchanged.
        folder: where to put the files; None for the client's cache.

    Returns:
        The folder with the files.
    """
    lock, raised = threading.Lock(), list[BaseException]()

    class ByteCounter(HiddenBar):
        """Reports the one progress bar of the client that counts the bytes of all files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._is_wanted = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> None:
            with lock:
                if raised:
                    raise _Stop
                if self._is_wanted:
                    self.n += int(n or 0)
                    try:
                        progress(self.n, max(self.n, int(self.total or 0)))
                    except BaseException as error:
                        raised.append(error)
                        raise _Stop from error

    def snapshot(api: HfApi) -> str:
        return api.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],
            local_dir=folder,
            cache_dir=folder / ".cache" / "hub" if folder is not None else None,  # what is cached may be damaged
            tqdm_class=ByteCounter,
        )

    try:
        return Path(hub.ask(what, snapshot))
    finally:
        if raised:  # also if hf_xet ignored it and went on
            raise raised[0] from None


def fetch_into_cache(
    hub: Hub,
    what: str,
    repo_id: str,
    revision: str | None,
    commit: str,
    files: Collection[RepoFile],
    progress: Progress,
) -> Path:
    """Fetch the files of a revision that the client's cache lacks, and compare these with the Hub's hashes.

    Args:
        hub: the Hub client.
        what: what is fetched, for error messages.
        repo_id: org/name.
        revision: branch, tag or commit, or None for main; kept in the cache for offline mode.
        commit: what the Hub says it is.
        files: the files.
        progress: see ``fetch``.

    Returns:
        The folder of the commit in the cache.

    Raises:
        IntegrityError: a file was damaged in transit; it is removed from the cache.
        NetworkError: the Hub stopped answering, so that the client silently took what its cache has.
    """
    absent = [file for file in files if not is_cached(repo_id, commit, file.path)]
    folder = fetch(hub, what, repo_id, revision, [file.path for file in files], progress)
    if folder.name != commit or not all((folder / file.path).exists() for file in files):
        raise NetworkError(
            f"{what}: the Hub stopped answering, and huggingface_hub fell back to an older or incomplete copy",
            hint="run the same command again",
        )
    for file in absent:
        _check_fetched(f"{repo_id}@{commit}", file, folder / file.path)
    return folder


def fetch_small(
    hub: Hub, repo_id: str, commit: str, name: str, tree: FileTree, limit_bytes: int = MAX_SMALL_FILE_BYTES
) -> bytes:
    """Return the content of a file that no manifest lists, from the client's cache, compared with the Hub's hash.

    Raises:
        IntegrityError: it is larger than the limit, so it is not fetched, or it was damaged in transit.
    """
    file, what = tree[name], f"{repo_id}@{commit}: {name}"
    if file.size > limit_bytes:
        raise IntegrityError(f"{what} has {file.size:,} bytes, too many for such a file", hint="do not trust it")
    path = Path(hub.ask(what, lambda api: api.hf_hub_download(repo_id, name, revision=commit, tqdm_class=HiddenBar)))
    _check_fetched(f"{repo_id}@{commit}", file, path)
    return path.read_bytes()


def is_cached(repo_id: str, commit: str, name: str) -> bool:
    """Return whether the client's cache has a file of a commit."""
    return isinstance(try_to_load_from_cache(repo_id, name, revision=commit), str)


def _check_fetched(what: str, file: RepoFile, path: Path) -> None:
    if is_intact(file, path):
        return
    links = [path.parent / os.readlink(path)] if path.is_symlink() else []
    for part in (path.resolve(), *links, path):  # the blob may itself link to storage shared by caches
        part.unlink(missing_ok=True)
    raise IntegrityError(f"{what}: {file.path} was damaged in transit", hint="run the same command again")
