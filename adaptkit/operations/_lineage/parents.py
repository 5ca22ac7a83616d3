"""Find the artifacts that a manifest names as parents, by their hashes, among given folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from adaptkit.arguments import path_hint
from adaptkit.checkpoint.integrity import measure
from adaptkit.checkpoint.layout import (
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    is_adapter,
    require_folder,
    resolve_inside,
    weight_files,
)
from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest, Parent, TensorRecord, read_manifest, tensors_root
from adaptkit.checkpoint.place import is_unfinished
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.errors import AdaptkitError, IntegrityError, UsageError


@dataclass(frozen=True)
class Candidate:
    """A folder that may be a parent.

    Attributes:
        path: folder.
        manifest: None if it has none.
        is_adapter: whether it is read as an adapter rather than as a model; a folder may hold both.
        threads, progress: for reading its files.
    """

    path: Path
    manifest: Manifest | None
    is_adapter: bool
    threads: int = 1
    progress: Progress = no_progress

    @cached_property
    def tensors(self) -> tuple[TensorRecord, ...]:
        """Its tensors from its manifest; without one, from its files, every byte of which is read once."""
        if self.manifest is not None:
            return self.manifest.tensors
        files = [ADAPTER_WEIGHTS_NAME] if self.is_adapter else weight_files(self.path)[0]
        paths = {file: resolve_inside(self.path, file) for file in files}
        sizes = {file: path.stat().st_size for file, path in paths.items() if path.is_file()}
        measured = measure(self.path, sizes, sizes, self.threads, self.progress)
        return tuple(tensor for file in measured.values() for tensor in file.tensors)

    @cached_property
    def root(self) -> str:
        """Hash of its tensors; see ``tensors_root``."""
        return tensors_root(self.tensors)

    def holds(self, parent: Parent, identity: object) -> bool:
        """Whether it has the tensors of a parent and, if that is known, the parent's ``adapter_identity``."""
        from adaptkit.checkpoint.adapter import adapter_identity, read_adapter  # here, since it loads numpy

        if self.manifest is None and self.is_adapter != (parent.role in ("adapter", "init")):
            return False
        try:
            is_same = identity is None or adapter_identity(read_adapter(self.path)) == identity
        except AdaptkitError:
            return False
        return is_same and self.root == parent.tensors_root


def find_candidates(
    folders: Sequence[Path], threads: int = 1, progress: Progress = no_progress
) -> tuple[list[Candidate], list[str]]:
    """List the artifacts, checkpoints and adapters in folders.

    Args:
        folders: each is one itself, or contains some.
        threads: for reading files.
        progress: called with bytes read.

    Returns:
        The candidates in the order of the folders, and error messages for those whose manifests cannot be read.

    Raises:
        UsageError: a folder contains none.
    """
    candidates: dict[tuple[Path, bool], Candidate] = {}
    broken = []
    for folder in folders:
        inside = [folder] if _kinds(require_folder(folder, path_hint)) else sorted(folder.iterdir())
        inside = [path for path in inside if path == folder or (not is_unfinished(path) and _kinds(path))]
        if not inside:
            raise UsageError(
                f"{folder}: neither an artifact nor a folder of artifacts",
                hint="give --parents folders that hold weights with a manifest, config.json or adapter_config.json",
            )
        for path in inside:
            try:
                manifest = read_manifest(path)
                for kind in _kinds(path):
                    candidates.setdefault((path.resolve(), kind), Candidate(path, manifest, kind, threads, progress))
            except (IntegrityError, OSError) as error:
                broken.append(f"{path}: {error}")
    return list(candidates.values()), broken


def find_parent(candidates: Sequence[Candidate], parent: Parent, identity: object = None) -> Candidate | None:
    """Return the folder that holds a parent; None if there is none.

    A folder with exactly the recorded manifest is preferred to one with the same tensors, which also counts because
    publishing adds a model card and so changes the manifest. The files of a folder without a manifest are read.

    Args:
        candidates: the folders to search.
        parent: as its child names it.
        identity: ``adapter_identity`` that selects among several folders with the same tensors; None if unknown.
    """
    recorded = parent.manifest_sha256
    for folder in candidates:
        if recorded is not None and folder.manifest is not None and folder.manifest.sha256 == recorded:
            return folder
    likely = sorted(candidates, key=lambda folder: (folder.manifest is None) == (recorded is not None))
    exact = (folder for folder in likely if identity is not None and folder.holds(parent, identity))
    return next(exact, None) or next((folder for folder in likely if folder.holds(parent, None)), None)


def _kinds(folder: Path) -> list[bool]:
    """Return what a folder holds: True for an adapter, False for a model, or both."""
    return [as_adapter for as_adapter in (True, False) if _is_kind(folder, as_adapter)]


def _is_kind(folder: Path, as_adapter: bool) -> bool:
    """Whether a folder has a manifest, or weights that are not pickles, of an adapter or of a model."""
    try:
        if (folder / MANIFEST_NAME).is_file():
            return as_adapter == is_adapter(folder)
        if as_adapter:
            return is_adapter(folder) and (folder / ADAPTER_WEIGHTS_NAME).is_file()
        return (folder / CONFIG_NAME).is_file() and bool(weight_files(folder)[0])
    except (AdaptkitError, OSError):  # an unrelated folder, which may be malformed or unreadable
        return False
