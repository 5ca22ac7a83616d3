"""Fetching files of a commit, each verified before it is used."""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import filter_repo_objects, tqdm  # type: ignore[attr-defined]

from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.integrity import file_problem
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import MAX_SMALL_FILE_BYTES, resolve_inside
from adaptkit.checkpoint.manifest import FileRecord, Manifest, TensorRecord
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.writer import sync_file
from adaptkit.errors import IntegrityError
from adaptkit.hub._client import Hub
from adaptkit.hub._remembered import CachedAnswer
from adaptkit.hub._remote import RemoteFile, matches
from adaptkit.hub._staging import in_memory
from adaptkit.wording import size

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256_DIGITS = 64
_LONG_BYTES = 10**9
"""Hashing more than this takes seconds, so a note is printed."""
DOWNLOADS = ".download"
"""Subfolder of the unfinished output for downloads; the client resumes partial files that it finds there."""


class HiddenBar(tqdm):
    """The client's progress bar, always disabled; the client would show one on any terminal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]


class _Stop(BaseException):
    """Stops the client after a progress callback raised; a BaseException, so it is neither translated nor retried."""


@contextmanager
def _forwarding(progress: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """Wrap a progress callback for use inside the client; an exception that it raises leaves the block unchanged."""
    raised: list[BaseException] = []

    def forward(*counts: int) -> None:
        try:
            if not raised:
                progress(*counts)
        except BaseException as error:
            raised.append(error)
        if raised:
            raise _Stop

    try:
        yield forward
    finally:
        if raised:  # raised here, since hf_xet ignores _Stop and continues
            raise raised[0] from None


def fetch_into_cache(
    hub: Hub, what: str, repo_id: str, revision: str | None, wanted: list[str], unwanted: list[str], progress: Progress
) -> Path:
    """Fetch the files of a revision that the shared cache lacks, and compare them with the hashes that name them there.

    Args:
        hub: the Hub client.
        what: what is fetched, for error messages.
        repo_id: org/name.
        revision: branch, tag or commit, or None for main.
        wanted: patterns of files to fetch.
        unwanted: patterns of files to leave out; they have precedence over ``wanted``.
        progress: called with (bytes received, total bytes); the total grows while the client starts further files.

    Raises:
        IntegrityError: a file was damaged in transit; it is removed from the cache.
    """
    lock = threading.Lock()

    class Counter(HiddenBar):
        """Reports the one progress bar of the client that counts the bytes of all files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._is_wanted = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> None:
            if self._is_wanted:
                with lock:
                    self.n += int(n or 0)
                    forward(self.n, max(self.n, int(self.total or 0)))

    def fetch(api: HfApi) -> str:
        return str(
            api.snapshot_download(
                repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted, tqdm_class=Counter
            )
        )

    with _forwarding(progress) as forward:
        folder = Path(hub.ask(what, fetch))
    links = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_symlink()}
    names = filter_repo_objects(links, allow_patterns=wanted, ignore_patterns=unwanted)
    _check_cached(hub, f"{repo_id}@{folder.name}", folder, {name: links[name] for name in names})
    return folder


def _check_cached(hub: Hub, what: str, folder: Path, links: Mapping[str, Path]) -> None:
    """Compare a snapshot's files with the Hub's hashes, which are the names of the blobs that the files link to.

    The client compares only sizes. Without symbolic links (some systems) nothing is compared. Files already compared
    are skipped while their size and modification time stay the same.
    """
    remembered = CachedAnswer({"compared with the Hub's hashes": str(folder)})
    before = remembered.read() or {}
    states = {name: state for name, path in links.items() if (state := _state(path)) is not None}
    todo = {name: state for name, state in states.items() if before.get(name) != state}
    nbytes = sum(state[1] for state in todo.values())
    if nbytes > _LONG_BYTES:
        hub.note(f"{what}: comparing {size(nbytes)} with the Hub's hashes")
    known = dict(before)
    try:
        for name, state in todo.items():
            if state[0] not in _hashes(links[name], state[0]):
                _remove_cached(links[name])
                raise IntegrityError(f"{what}: {name} was damaged in transit", hint="run the same command again")
            known[name] = state
    finally:
        if known != before:
            remembered.keep(known)


def _state(path: Path) -> list[Any] | None:
    """Return [blob name, size, mtime] of a linked file; None if the name is not a hash or the file is absent."""
    called = os.path.basename(os.readlink(path))
    if not _HASH.fullmatch(called) or not path.exists():
        return None
    found = path.stat()
    return [called, found.st_size, found.st_mtime_ns]


def _hashes(path: Path, called: str) -> set[str]:
    """Return the hashes by which the Hub or a mirror may name a file, of the kind that ``called`` has by its length."""
    if len(called) == _SHA256_DIGITS:
        return {file_sha256(path)}
    content = path.read_bytes()  # small: only files stored in git have a sha1
    blob = b"blob %d\0" % len(content) + content
    return {hashlib.sha1(data, usedforsecurity=False).hexdigest() for data in (blob, content)}


def _remove_cached(path: Path) -> None:
    """Remove a file from a snapshot with all that it links to; the blob may itself link to storage shared by caches."""
    for part in (path.resolve(), path.parent.joinpath(os.readlink(path)), path):
        part.unlink(missing_ok=True)


def fetch_files(
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
    total, done, there = sum(record.size for record in records), 0, 0
    out.require_space(total)

    def arrived(count: int) -> None:
        nonlocal there
        there += count
        progress(min(there, total), total)

    for record in records:
        there = done
        if not out.finished(record.path):
            tensors = [tensor for tensor in manifest.tensors if tensor.file == record.path]
            download(hub, repo_id, commit, record.path, out.folder / DOWNLOADS, arrived)
            _move_if_valid(f"{repo_id}@{commit}", record, tensors, out.folder)
            out.add(record, tensors)
        done += record.size
        progress(done, total)


def fetch_small(
    hub: Hub, repo_id: str, commit: str, name: str, remote: RemoteFile, limit_bytes: int = MAX_SMALL_FILE_BYTES
) -> bytes:
    """Fetch a file that no manifest lists, and compare it with the Hub's hash.

    Raises:
        IntegrityError: the file is larger than the limit, so it is not fetched, or it was damaged in transit.
    """
    if remote.size > limit_bytes:
        raise IntegrityError(
            f"{repo_id}@{commit}: {name} has {remote.size:,} bytes, too many for such a file", hint="do not trust it"
        )
    with TemporaryDirectory(prefix="adaptkit-pull-") as folder:
        content = download(hub, repo_id, commit, name, Path(folder)).read_bytes()
    if not matches(remote, in_memory(name, content)):
        raise IntegrityError(f"{repo_id}@{commit}: {name} was damaged in transit", hint="run the same command again")
    return content


def download(
    hub: Hub,
    repo_id: str,
    revision: str | None,
    name: str,
    folder: Path,
    arrived: Callable[[int], None] = lambda count: None,
) -> Path:
    """Download one file, bypassing the shared cache, whose content may be damaged.

    Args:
        hub: the Hub client.
        repo_id: org/name.
        revision: commit, or None for main.
        name: path of the file.
        folder: target folder; a partial file of an earlier try there is resumed.
        arrived: called with the number of bytes received since the last call; negative if bytes must be fetched again.
    """

    class Counter(HiddenBar):
        """Reports the bytes of the file."""

        def update(self, n: float | None = 1) -> None:
            forward(int(n or 0))

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

    with _forwarding(arrived) as forward:
        return hub.ask(f"{repo_id}@{revision}: {name}" if revision else f"{repo_id}: {name}", fetch)


def _move_if_valid(source: str, record: FileRecord, tensors: Sequence[TensorRecord], folder: Path) -> None:
    arrived = resolve_inside(folder / DOWNLOADS, record.path)
    problem = file_problem(folder / DOWNLOADS, record, tensors)
    if problem:
        arrived.unlink(missing_ok=True)  # or the next run would take it for a finished download
        raise IntegrityError(
            f"{source}: {problem}; it was damaged in transit, or is not what was published",
            hint="run the same command again",
        )
    final = resolve_inside(folder, record.path)
    final.parent.mkdir(parents=True, exist_ok=True)
    sync_file(arrived)
    os.replace(arrived, final)
