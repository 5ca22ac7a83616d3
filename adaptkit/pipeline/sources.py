"""Find and hash the sources of a release.

A file is identified by its sha256; a folder that adaptkit made by its manifest, with which all its files are compared;
any other folder by the sha256 of every file that the recipe's operations read. The work folder caches the hashes of
files whose size and times did not change.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.hashing import file_digests
from adaptkit.checkpoint.header import check_regular
from adaptkit.checkpoint.integrity import check_names
from adaptkit.checkpoint.layout import CARD_NAME, has_checkpoint, is_adapter, resolve_inside
from adaptkit.checkpoint.manifest import MANIFEST_NAME, TensorRecord, read_manifest, tensors_root
from adaptkit.checkpoint.place import refuse_inside_artifact, require_writable_parent
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.side_files import READ_SUFFIXES, find_side_files
from adaptkit.checkpoint.writer import replace_file
from adaptkit.errors import IntegrityError, NetworkError
from adaptkit.hub.listing import Listing, list_files
from adaptkit.hub.sources import (
    download,
    find_cached,
    find_commit,
    find_complete,
    is_commit,
    note_if_incomplete,
)
from adaptkit.operations._threads import fingerprints
from adaptkit.pipeline.lock import Lock
from adaptkit.pipeline.recipe import Source

_FRESH_SECONDS = 2.0
"""Hashes of younger files are not cached: a file may change again within the resolution of its timestamp."""


@dataclass(frozen=True)
class Material:
    """A source, or a step's output, as the input of other steps.

    Attributes:
        path: of the file or folder; None if it is not on this machine yet.
        digest: identifies its content; None if not known yet.
        nbytes: its size.
        locked: its entry in the lock; empty for a step's output.
    """

    path: Path | None
    digest: str | None
    nbytes: int
    locked: Mapping[str, Any]


class Hashes:
    """Cache of files' sha256 and folders' tensors roots, kept between runs.

    Args:
        file: the cache file.
        fresh: ignore the cache file's content, and read everything again.
    """

    def __init__(self, file: Path, fresh: bool) -> None:
        self._file = file
        self._known: dict[str, Any] = {"files": {}, "roots": {}}
        try:
            known = {} if fresh else json.loads(file.read_text())
            if isinstance(known.get("files"), dict) and isinstance(known.get("roots"), dict):
                self._known = known
        except (OSError, ValueError, AttributeError, RecursionError):
            pass  # the cache only saves time

    def sha256(self, path: Path, on_read: Callable[[int], None] = lambda count: None) -> str:
        """Return the sha256 of a file; ``on_read`` is called with the number of bytes of each piece."""
        check_regular(path)
        found = path.stat()
        name, state = str(path.resolve()), [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        known = self._known["files"].get(name)
        if isinstance(known, list) and known[:-1] == state:
            on_read(found.st_size)
            return str(known[-1])
        _, digest, _ = file_digests(path, [], on_read)
        if time.time() - found.st_ctime > _FRESH_SECONDS:
            self._known["files"][name] = [*state, digest]
        return digest

    def root(self, digest: str, compute: Callable[[], str]) -> str:
        """Return the ``tensors_root`` of a folder whose files have this digest, computing it if it is not cached."""
        if digest not in self._known["roots"]:
            self._known["roots"][digest] = compute()
        return str(self._known["roots"][digest])

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


@dataclass(frozen=True)
class Location:
    """Where a source is.

    Attributes:
        path: of the file or folder; None for a repository, unless the run is offline.
        commit: of a repository.
        listing: of a repository that the Hub was asked about.
    """

    path: Path | None
    commit: str | None = None
    listing: Listing | None = None


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
    repo, commit, place = str(source.repo), lock.commit(source), ("sources", source.name, "commit")
    if offline:
        found = find_cached(repo, commit or source.revision)
        if found is None:
            raise source.place.error(
                f"{source} is not in huggingface_hub's cache", hint="run it once without --offline"
            )
        lock.add(found.name, *place)
        files = lock.files(source)
        if absent := sorted(name for name in files if not (found / name).exists()):
            raise source.place.error(
                f"huggingface_hub's cache has only a part of {source}: {absent[0]} is missing",
                hint="run it once without --offline",
            )
        if not files:
            note_if_incomplete(repo, found, note)
        return Location(found, found.name)
    now = _revision_commit(source, commit, note)
    lock.add(now, *place)
    return Location(None, now, list_files(repo, now, note))


def resolve(
    source: Source,
    location: Location,
    hashes: Hashes,
    *,
    with_card: bool,
    as_checkpoint: bool,
    fetch: bool,
    progress: Progress,
    note: Callable[[str], None],
) -> Material:
    """Download a source if it is a repository, and hash it.

    Args:
        source: of a recipe.
        location: where it is.
        hashes: cache of hashes.
        with_card: whether an operation reads the folder's model card.
        as_checkpoint: whether an operation takes a folder that also holds an adapter as a checkpoint.
        fetch: download a repository that is not cached; otherwise its material stays unknown.
        progress: called with the number of bytes downloaded, then with the number of bytes hashed.
        note: called with a one-line message, such as what is being waited for.

    Raises:
        IntegrityError: the folder does not match its manifest.
        CheckpointError, AdapterError: the folder is neither a checkpoint nor an adapter.
        AuthenticationError, NetworkError: the Hub denied access or did not answer.
    """
    locked: dict[str, Any] = source.written() | ({} if location.commit is None else {"commit": location.commit})
    path = location.path
    if path is None:
        repo, commit, listing = str(source.repo), str(location.commit), location.listing
        if fetch or listing is None:  # in the client's offline mode, which downloads nothing
            path = download(repo, commit, progress, note)
        elif (path := find_complete(repo, commit, listing.tree)) is None:
            return Material(None, None, listing.nbytes, locked)
    if path.is_dir():
        digest, nbytes, found = _folder(path, hashes, with_card, progress)
        if "files" in found:  # without a manifest
            found |= {"tensors_root": _tensors_root(path, hashes, digest, as_checkpoint, progress)}
        return Material(path, digest, nbytes, locked | found)
    (digest,) = _sha256_of([path], hashes, progress)
    return Material(path, digest, path.stat().st_size, locked | {"sha256": digest})


def _revision_commit(source: Source, locked: str | None, note: Callable[[str], None]) -> str:
    """Return the commit of a repository's revision; if the Hub does not tell, the hint says whether to use the cache.

    Raises:
        UsageError, ConflictError, AuthenticationError, NetworkError: see ``find_commit``.
    """
    if is_commit(source.revision):
        return source.revision
    repo = str(source.repo)
    try:
        return find_commit(repo, source.revision, note)
    except NetworkError as error:
        is_cached = find_cached(repo, locked or source.revision) is not None
        offered = "or use --offline, for the copy in" if is_cached else "to use --offline, it would have to be in"
        error.advise(f"{error.hint}; {offered} huggingface_hub's cache")
        raise


def digest_of(path: Path, hashes: Hashes, *, with_card: bool) -> str:
    """Return the digest of a source's present content; see ``Material``.

    Raises:
        IntegrityError, CheckpointError, AdapterError: it does not match its manifest, or does not exist any more.
    """
    return _folder(path, hashes, with_card)[0] if path.is_dir() else hashes.sha256(path)


def _sha256_of(files: Sequence[Path], hashes: Hashes, progress: Progress) -> list[str]:
    done, total = 0, sum(file.stat().st_size for file in files if file.is_file())

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return [hashes.sha256(file, advance) for file in files]


def _folder(
    path: Path, hashes: Hashes, with_card: bool, progress: Progress = no_progress
) -> tuple[str, int, dict[str, Any]]:
    manifest = read_manifest(path)
    if manifest is not None:
        check_names(path, manifest)
        digests = _sha256_of([resolve_inside(path, record.path) for record in manifest.files], hashes, progress)
        changed = [r.path for r, digest in zip(manifest.files, digests, strict=True) if digest != r.sha256]
        if changed:
            raise IntegrityError(
                f"{path}: {changed[0]} does not match {MANIFEST_NAME}",
                hint="download or copy it again; if it is the same on the Hub, ask the publisher to publish it again",
            )
        found = {"manifest_sha256": manifest.sha256, "tensors_root": manifest.tensors_root}
        return manifest.sha256, sum(record.size for record in manifest.files), found
    found_files = {p.name: p for p in path.iterdir() if p.suffix in READ_SUFFIXES and not p.is_dir()}
    found_files |= find_side_files(path)
    if with_card and (path / CARD_NAME).is_file():
        found_files[CARD_NAME] = path / CARD_NAME
    others = (".", "consolidated")  # the latter are another format's copy of the same weights
    read = {name: file for name, file in sorted(found_files.items()) if not name.startswith(others)}
    files = dict(zip(read, _sha256_of(list(read.values()), hashes, progress), strict=True))
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return digest, sum((path / name).stat().st_size for name in files), {"files": files}


def _tensors_root(path: Path, hashes: Hashes, digest: str, as_checkpoint: bool, progress: Progress) -> str:
    """Return the ``tensors_root`` of a folder without a manifest, as manifests record it for such a parent."""

    def of_checkpoint() -> str:
        checkpoint = Checkpoint(path)
        digests = fingerprints(checkpoint, 1, progress)
        return tensors_root(TensorRecord.of(found.spec, digests[name]) for name, found in checkpoint.tensors.items())

    if not is_adapter(path):
        return hashes.root(digest, of_checkpoint)
    if as_checkpoint and has_checkpoint(path):
        return hashes.root(f"{digest} as checkpoint", of_checkpoint)  # the digest covers the adapter, too
    return hashes.root(digest, lambda: tensors_root(read_adapter(path).records))
