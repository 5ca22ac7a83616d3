"""Find and hash the sources of a release.

A file is identified by its sha256; a folder that adaptkit made by its manifest, with which all its files are compared;
any other folder by the sha256 of every file that the recipe's operations read. The work folder caches the hashes of
files whose size and times did not change.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.hashing import file_digests
from adaptkit.checkpoint.header import check_regular
from adaptkit.checkpoint.integrity import check_names
from adaptkit.checkpoint.layout import CARD_NAME, resolve_inside
from adaptkit.checkpoint.manifest import MANIFEST_NAME, read_manifest
from adaptkit.checkpoint.place import refuse_inside_artifact, require_writable_parent
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.side_files import READ_SUFFIXES, find_side_files
from adaptkit.checkpoint.writer import replace_file
from adaptkit.errors import IntegrityError, NetworkError
from adaptkit.hub.names import is_commit
from adaptkit.hub.sources import download, find_cached, find_commit, find_complete, note_if_incomplete
from adaptkit.pipeline.lock import Lock
from adaptkit.pipeline.recipe import Source

_FRESH_SECONDS = 2.0
"""Hashes of younger files are not cached: a file may change again within the resolution of its timestamp."""


@dataclass(frozen=True)
class StepInput:
    """A source, or a step's output, as the input of other steps.

    Attributes:
        path: of the file or folder; None if it is not on this machine yet.
        digest: identifies its content; None if not known yet.
        nbytes: its size.
        lock_entry: its entry in the lock; empty for a step's output.
    """

    path: Path | None
    digest: str | None
    nbytes: int
    lock_entry: Mapping[str, Any]


@dataclass(frozen=True)
class Location:
    """Where a source is.

    Attributes:
        path: of the file or folder; None for a repository, unless the run is offline.
        commit: of a repository.
    """

    path: Path | None
    commit: str | None = None


class Hashes:
    """Cache of files' sha256, kept between runs.

    Args:
        file: the cache file.
        fresh: ignore the cache file's content, and read everything again.
    """

    def __init__(self, file: Path, fresh: bool) -> None:
        self._file = file
        self._known: dict[str, Any] = {}
        try:
            known = {} if fresh else json.loads(file.read_text())
            self._known = known if isinstance(known, dict) else {}
        except (OSError, ValueError, RecursionError):
            pass  # the cache only saves time

    def sha256(self, path: Path, on_read: Callable[[int], None] = lambda count: None) -> str:
        """Return the sha256 of a file; ``on_read`` is called with the number of bytes of each piece."""
        check_regular(path)
        found = path.stat()
        name, state = str(path.resolve()), [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        known = self._known.get(name)
        if isinstance(known, list) and known[:-1] == state:
            on_read(found.st_size)
            return str(known[-1])
        _, digest, _ = file_digests(path, [], on_read)
        if time.time() - found.st_ctime > _FRESH_SECONDS:
            self._known[name] = [*state, digest]
        return digest

    def all_sha256(self, files: Iterable[Path], progress: Progress) -> list[str]:
        """Return the sha256 of each file; ``progress`` is called with (done, total) bytes."""
        listed = list(files)
        done, total = 0, sum(file.stat().st_size for file in listed if file.is_file())

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        return [self.sha256(file, advance) for file in listed]

    def save(self) -> None:
        """Write the cache file if it changes, so that a run that keeps everything may read from a read-only disk."""
        content = json.dumps(self._known, sort_keys=True).encode()
        if not self._file.is_file() or self._file.read_bytes() != content:
            replace_file(self._file, content)


def check_apart(sources: Iterable[Source], folder: Path, work: Path) -> None:
    """Reject a work folder inside a source or another artifact, which every step would change, or that cannot be made.

    Raises:
        ConfigError: names the source.
        UsageError: names the artifact, or the folder that cannot be written.
    """
    inner = Path(os.path.realpath(work))  # which accepts links in a circle, as Path.resolve does not
    for source in sources:
        if source.path is not None and inner.is_relative_to(os.path.realpath(folder / source.path)):
            raise source.place.at("path").error(f"contains the work folder {work}", hint="choose another --work")
    refuse_inside_artifact(work, f"{work}: the work folder is", "--work")
    if not work.exists():
        require_writable_parent(work, "choose another --work")


def locate(source: Source, folder: Path, lock: Lock, *, offline: bool, note: Callable[[str], None]) -> Location:
    """Find a source, without downloading or hashing it; record a repository's commit in the lock.

    Offline, the lock's commit is used instead of the revision, and only its list of files tells whether the cache is
    complete.

    Args:
        source: of a recipe.
        folder: the recipe's folder.
        lock: of the run.
        offline: use repositories only from huggingface_hub's cache.
        note: called with a one-line message, such as what is being waited for.

    Raises:
        DriftError: the enforced lock names another commit.
        ConfigError: the path does not exist, or, offline, the repository is not completely cached.
        UsageError, CheckpointError: the repository has nothing that adaptkit reads.
        AuthenticationError, NetworkError: the Hub denied access or did not answer.
    """
    if source.path is not None:
        path = folder / source.path
        if not os.path.exists(path):  # Path.exists raises if a name is too long
            raise source.place.at("path").error("does not exist", hint=f"check the path: {path}")
        return Location(path)
    repo, commit = str(source.repo), lock.commit(source)
    cached = find_cached(repo, commit or source.revision) if offline else None
    if offline:
        if cached is None:
            hint = "run it once without --offline"
            raise source.place.error(f"{source} is not in huggingface_hub's cache", hint=hint)
        found = cached.name
    else:
        found = source.revision if is_commit(source.revision) else _ask_for_commit(source, note)
    lock.add(found, "sources", source.name, "commit")
    if cached is not None:
        files = lock.files(source)
        if absent := sorted(name for name in files if not (cached / name).exists()):
            problem = f"huggingface_hub's cache has only a part of {source}: {absent[0]} is missing"
            raise source.place.error(problem, hint="run it once without --offline")
        if not files:
            note_if_incomplete(repo, cached, note)
    return Location(cached, found)


def _ask_for_commit(source: Source, note: Callable[[str], None]) -> str:
    try:
        return find_commit(str(source.repo), source.revision, note)
    except NetworkError as error:
        error.advise(f"{error.hint}; or use --offline, if huggingface_hub's cache has a copy")
        raise


def resolve(
    source: Source,
    location: Location,
    hashes: Hashes,
    *,
    with_card: bool,
    fetch: bool,
    progress: Progress,
    note: Callable[[str], None],
) -> StepInput:
    """Download a source if it is a repository, and hash it.

    Args:
        source: of a recipe.
        location: where it is.
        hashes: cache of hashes.
        with_card: whether an operation reads the folder's model card.
        fetch: download a repository that is not cached; otherwise its material stays unknown.
        progress: called with the number of bytes downloaded, then with the number of bytes hashed.
        note: called with a one-line message, such as what is being waited for.

    Raises:
        IntegrityError: the folder does not match its manifest.
        UsageError, CheckpointError: the repository has nothing that adaptkit reads.
        AuthenticationError, NetworkError: the Hub denied access or did not answer.
    """
    entry: dict[str, Any] = source.entry() | ({} if location.commit is None else {"commit": location.commit})
    path = location.path
    if path is None:
        repo, commit = str(source.repo), str(location.commit)
        if fetch:
            path = download(repo, commit, progress, note)
        else:
            path, nbytes = find_complete(repo, commit, note)
            if path is None:
                return StepInput(None, None, nbytes, entry)
    if path.is_dir():
        digest, nbytes, found = _folder(path, hashes, with_card, progress)
        return StepInput(path, digest, nbytes, entry | found)
    (digest,) = hashes.all_sha256([path], progress)
    return StepInput(path, digest, path.stat().st_size, entry | {"sha256": digest})


def digest_of(path: Path, hashes: Hashes, *, with_card: bool) -> str:
    """Return the digest of a source's present content; see ``StepInput``.

    Raises:
        IntegrityError: it does not match its manifest, or does not exist any more.
    """
    return _folder(path, hashes, with_card)[0] if path.is_dir() else hashes.sha256(path)


def _folder(
    path: Path, hashes: Hashes, with_card: bool, progress: Progress = no_progress
) -> tuple[str, int, dict[str, Any]]:
    """Return a folder's digest, its size, and its entry in the lock."""
    manifest = read_manifest(path)
    if manifest is not None:
        check_names(path, manifest)
        digests = hashes.all_sha256((resolve_inside(path, record.path) for record in manifest.files), progress)
        changed = [r.path for r, digest in zip(manifest.files, digests, strict=True) if digest != r.sha256]
        if changed:
            raise IntegrityError(
                f"{path}: {changed[0]} does not match {MANIFEST_NAME}",
                hint="download or copy it again; if it is the same on the Hub, ask the publisher to publish it again",
            )
        entry = {"manifest_sha256": manifest.sha256, "tensors_root": manifest.tensors_root}
        return manifest.sha256, sum(record.size for record in manifest.files), entry
    read = {p.name: p for p in path.iterdir() if p.suffix in READ_SUFFIXES and not p.is_dir()}
    read |= find_side_files(path)
    if with_card and (path / CARD_NAME).is_file():
        read[CARD_NAME] = path / CARD_NAME
    others = (".", "consolidated")  # the latter are another format's copy of the same weights
    read = {name: file for name, file in sorted(read.items()) if not name.startswith(others)}
    files = dict(zip(read, hashes.all_sha256(read.values(), progress), strict=True))
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return digest, sum((path / name).stat().st_size for name in files), {"files": files}
