"""Fetch single files of a commit, and believe none of them before it was compared."""

import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.integrity import file_problem
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import resolve_inside
from adaptkit.checkpoint.manifest import FileRecord, Manifest
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.writer import sync_file
from adaptkit.errors import IntegrityError
from adaptkit.hub._client import Hub
from adaptkit.hub._remote import RemoteFile, git_sha1, matches
from adaptkit.hub._staging import in_memory

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
DOWNLOADS = ".download"
"""Where files arrive, in the unfinished folder: the client finds there what an earlier run fetched of them."""


class Silent(tqdm):
    """The client's progress bar without a bar, which would be there on a terminal whatever was asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]


def fetch_into_cache(
    hub: Hub, what: str, repo_id: str, revision: str | None, wanted: list[str], unwanted: list[str], told: Progress,
    checked: set[Path],
) -> Path:  # fmt: skip
    """Fetch what the shared cache lacks of a revision, and compare it with the hashes that it is called by there.

    Args:
        hub: where from.
        what: it is about, for errors.
        repo_id: org/name.
        revision: branch, tag or commit, or None for main.
        wanted: patterns of files.
        unwanted: patterns of those that are left out all the same.
        told: of bytes that arrived, of how many; that number grows while the client asks for one file after another.
        checked: files that were compared already; grows.

    Raises:
        IntegrityError: one was damaged on the way; it is not kept.
    """
    lock, arrived = threading.Lock(), threading.Event()

    class Counter(Silent):
        """The one of the client's bars that counts the bytes of all files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._is_wanted = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> None:
            if self._is_wanted:
                arrived.set()
                with lock:
                    self.n += int(n or 0)
                    told(self.n, max(self.n, int(self.total or 0)))

    def fetch(api: HfApi) -> str:
        return str(
            api.snapshot_download(
                repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted, tqdm_class=Counter
            )
        )

    folder = Path(hub.ask(what, fetch))
    if arrived.is_set():
        _check_cached(f"{repo_id}@{folder.name}", folder, checked)
    return folder


def _check_cached(what: str, folder: Path, checked: set[Path]) -> None:
    """Compare a snapshot's files with the names of what they are links to, which are the Hub's hashes.

    The client compares sizes only. Where a system has no links, nothing can be compared.
    """
    for path in sorted(folder.rglob("*")):
        blob = path.parent.joinpath(os.readlink(path)) if path.is_symlink() else path
        if path in checked or not path.is_symlink() or not _HASH.fullmatch(blob.name):
            continue
        record = FileRecord(path.name, path.stat().st_size, file_sha256(path))
        if blob.name not in (record.sha256, git_sha1(path, record)):
            for part in (path.resolve(), blob, path):  # what is there may be a link, too, to what other caches share
                part.unlink(missing_ok=True)
            raise IntegrityError(
                f"{what}: {path.relative_to(folder)} was damaged on the way", hint="run the same command again"
            )
        checked.add(path)


def fetch_files(
    hub: Hub, repo_id: str, commit: str, manifest: Manifest, records: Sequence[FileRecord], out: Output, told: Progress
) -> None:
    """Fetch files of an artifact; each moves into the output only when its sha256 is the manifest's.

    Raises:
        IntegrityError: one was damaged on the way, or is not what was published.
    """
    total, done = sum(record.size for record in records), 0
    for record in records:
        if not out.finished(record.path):
            counted = _Counted(told, done, total)
            download(hub, repo_id, commit, record.path, out.folder / DOWNLOADS, counted.add)
            _move_if_right(f"{repo_id}@{commit}", record, out.folder)
            out.add(record, [tensor for tensor in manifest.tensors if tensor.file == record.path])
        done += record.size
        told(done, total)


def fetch_small(hub: Hub, repo_id: str, commit: str, name: str, remote: RemoteFile) -> bytes:
    """Fetch a file that no manifest lists, and compare it with the Hub's own hash: nothing else vouches for it.

    Raises:
        IntegrityError: it was damaged on the way.
    """
    with TemporaryDirectory(prefix="adaptkit-pull-") as folder:
        content = download(hub, repo_id, commit, name, Path(folder)).read_bytes()
    if not matches(remote, in_memory(name, content)):
        raise IntegrityError(f"{repo_id}@{commit}: {name} was damaged on the way", hint="run the same command again")
    return content


def download(
    hub: Hub,
    repo_id: str,
    revision: str | None,
    name: str,
    folder: Path,
    arrived: Callable[[int], None] = lambda count: None,
) -> Path:
    """Download one file. The shared cache is left out: what is wrong in it would be taken for the Hub's.

    Args:
        hub: where from.
        repo_id: org/name.
        revision: commit, or None for main.
        name: of the file.
        folder: where to; what an earlier try left there is gone on from.
        arrived: told of bytes, a negative number if they have to be fetched again.
    """

    class Counter(Silent):
        """Hands on what it is told."""

        def update(self, n: float | None = 1) -> None:
            arrived(int(n or 0))

    def fetch(api: HfApi) -> Path:
        return Path(
            hf_hub_download(
                repo_id,
                name,
                revision=revision,
                local_dir=folder,
                cache_dir=folder / ".cache" / "hub",
                endpoint=api.endpoint,
                library_name=api.library_name,
                tqdm_class=Counter,
            )
        )

    return hub.ask(f"{repo_id}@{revision}: {name}" if revision else f"{repo_id}: {name}", fetch)


def _move_if_right(source: str, record: FileRecord, folder: Path) -> None:
    arrived = resolve_inside(folder / DOWNLOADS, record.path)
    problem = file_problem(folder / DOWNLOADS, record)
    if problem:
        arrived.unlink(missing_ok=True)  # or the next run would find it and believe it
        raise IntegrityError(
            f"{source}: {problem}; it was damaged on the way, or is not what was published",
            hint="run the same command again",
        )
    final = resolve_inside(folder, record.path)
    final.parent.mkdir(parents=True, exist_ok=True)
    sync_file(arrived)
    os.replace(arrived, final)


class _Counted:
    """Turns numbers of bytes that arrive into how many are there."""

    def __init__(self, told: Progress, done: int, total: int) -> None:
        self._told, self._done, self._total = told, done, total

    def add(self, count: int) -> None:
        self._done += count
        self._told(min(self._done, self._total), self._total)
