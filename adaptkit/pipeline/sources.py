"""What a release is made from, found and hashed.

A file is known by its sha256. A folder that adaptkit made is known by its manifest, with which all its files are
compared; another one by the sha256 of every file that operations read. Hashes of files whose size and times did not
change are remembered in the work folder.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.adapter_config import is_adapter
from adaptkit.checkpoint.hashing import file_digests, tensors_root
from adaptkit.checkpoint.header import check_regular
from adaptkit.checkpoint.integrity import check_names
from adaptkit.checkpoint.layout import READ_SUFFIXES, resolve_inside, side_files
from adaptkit.checkpoint.manifest import MANIFEST_NAME, TensorRecord, read_manifest
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.writer import replace_file
from adaptkit.errors import IntegrityError
from adaptkit.hub.sources import download, find_cached, find_commit, find_whole, is_commit, size_of, tell_of_parts
from adaptkit.operations._threads import fingerprints
from adaptkit.pipeline.recipe import Source

_FRESH_SECONDS = 2.0
"""A file that is younger may change again within the resolution of its time."""


@dataclass(frozen=True)
class Material:
    """A source, or what a step made, as other steps read it.

    Attributes:
        path: of the file or folder; None if it is not on this machine yet.
        digest: tells it from every other; None if that is not known yet.
        nbytes: in it.
        locked: what the lock says of it.
    """

    path: Path | None
    digest: str | None
    nbytes: int
    locked: Mapping[str, Any]


class Hashes:
    """sha256 of files, and roots of tensors, remembered between runs.

    Args:
        file: to remember them in.
        fresh: read everything again.
    """

    def __init__(self, file: Path, fresh: bool = False) -> None:
        self._file = file
        self._known: dict[str, Any] = {"files": {}, "roots": {}}
        try:
            known = {} if fresh else json.loads(file.read_text())
            if isinstance(known.get("files"), dict) and isinstance(known.get("roots"), dict):
                self._known = known
        except (OSError, ValueError, AttributeError, RecursionError):
            pass  # it only saves time

    def sha256(self, path: Path, told: Callable[[int], None] = lambda count: None) -> str:
        """Of a file; ``told`` is given the number of bytes of each piece of it."""
        check_regular(path)
        found = path.stat()
        name, state = str(path.resolve()), [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        known = self._known["files"].get(name)
        if isinstance(known, list) and known[:-1] == state:
            told(found.st_size)
            return str(known[-1])
        _, digest, _ = file_digests(path, [], told)
        if time.time() - found.st_ctime > _FRESH_SECONDS:
            self._known["files"][name] = [*state, digest]
        return digest

    def root(self, digest: str, compute: Callable[[], str]) -> str:
        """Of the tensors of a folder whose files have this digest."""
        if digest not in self._known["roots"]:
            self._known["roots"][digest] = compute()
        return str(self._known["roots"][digest])

    def save(self) -> None:
        """Remember them."""
        replace_file(self._file, json.dumps(self._known).encode())


def check_apart(sources: Iterable[Source], folder: Path, work: Path) -> None:
    """Refuse a work folder in a source, which would change with every step.

    Raises:
        ConfigError: names the source.
    """
    for source in sources:
        if source.path is not None and work.resolve().is_relative_to((folder / source.path).resolve()):
            raise source.place.at("path").error(f"contains the work folder {work}", hint="choose another --work")


def resolve(
    source: Source,
    folder: Path,
    hashes: Hashes,
    *,
    offline: bool,
    fetch: bool,
    commit: str | None,
    files: set[str],
    on_commit: Callable[[str], None],
    progress: Progress,
    note: Callable[[str], None],
) -> Material:
    """Find a source and hash it.

    Args:
        source: of a recipe.
        folder: of the recipe.
        hashes: that are known.
        offline: take a repository from huggingface_hub's cache, or not at all.
        fetch: download what is not there; else it stays unknown.
        commit: that a lock names for the repository; without the network it stands for the revision.
        files: that a lock names for it there; without the network nobody else can say what is all of it.
        on_commit: told which commit the repository's revision stands for, before it is downloaded.
        progress: told of bytes that arrived, then of bytes that were hashed.
        note: told in a line for people what is waited for.

    Raises:
        UsageError: it is not there.
        IntegrityError: it is not what its manifest says.
        CheckpointError, AdapterError: a folder that is neither a checkpoint nor an adapter.
        AuthenticationError, NetworkError: the Hub refused or did not answer.
    """
    if source.path is not None:
        path = folder / source.path
        if not path.exists():
            raise source.place.at("path").error("does not exist", hint=f"check the path: {path}")
        return _material(source, path, {}, hashes, progress)
    repo = str(source.repo)
    if offline:
        found = find_cached(repo, commit or source.revision)
        if found is None:
            raise source.place.error(
                f"{source} is not in huggingface_hub's cache", hint="run it once without --offline"
            )
        on_commit(found.name)
        if absent := sorted(name for name in files if not (found / name).exists()):
            raise source.place.error(
                f"huggingface_hub's cache has only a part of {source}: {absent[0]} is missing",
                hint="run it once without --offline",
            )
        if not files:
            tell_of_parts(repo, found, note)
        return _material(source, found, {"commit": found.name}, hashes, progress)
    now = source.revision if is_commit(source.revision) else find_commit(repo, source.revision, note)
    on_commit(now)
    here = download(repo, now, progress, note) if fetch else find_whole(repo, now, note)
    if here is None:
        return Material(None, None, size_of(repo, now, note), source.written() | {"commit": now})
    return _material(source, here, {"commit": now}, hashes, progress)


def _material(source: Source, path: Path, more: Mapping[str, str], hashes: Hashes, progress: Progress) -> Material:
    if path.is_dir():
        digest, nbytes, found = _folder(path, hashes, progress)
    else:
        (digest,), nbytes = _sha256_of([path], hashes, progress), path.stat().st_size
        found = {"sha256": digest}
    return Material(path, digest, nbytes, {**source.written(), **more, **found})


def digest_of(path: Path, hashes: Hashes) -> str:
    """What tells a source's present content from every other.

    Raises:
        IntegrityError, CheckpointError, AdapterError: it is not what its manifest says, or not there any more.
    """
    return _folder(path, hashes)[0] if path.is_dir() else hashes.sha256(path)


def _sha256_of(files: Sequence[Path], hashes: Hashes, progress: Progress) -> list[str]:
    done, total = 0, sum(file.stat().st_size for file in files if file.is_file())

    def told(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return [hashes.sha256(file, told) for file in files]


def _folder(path: Path, hashes: Hashes, progress: Progress = no_progress) -> tuple[str, int, dict[str, Any]]:
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
    found_files = {p.name: p for p in path.iterdir() if p.suffix in READ_SUFFIXES and not p.is_dir()} | side_files(path)
    others = (".", "consolidated")  # the latter are another format's copy of the same weights
    read = {name: file for name, file in sorted(found_files.items()) if not name.startswith(others)}
    files = dict(zip(read, _sha256_of(list(read.values()), hashes, progress), strict=True))
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    root = hashes.root(digest, lambda: _tensors_root(path, progress))
    return digest, sum((path / name).stat().st_size for name in files), {"files": files, "tensors_root": root}


def _tensors_root(path: Path, progress: Progress) -> str:
    """As a manifest names a parent that has none itself."""
    if is_adapter(path):
        return tensors_root(read_adapter(path).records)
    checkpoint = Checkpoint(path)
    digests = fingerprints(checkpoint, 1, progress)
    return tensors_root(TensorRecord.of(found.spec, digests[name]) for name, found in checkpoint.tensors.items())
