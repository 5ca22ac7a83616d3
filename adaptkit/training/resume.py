"""Checkpoints of a training run.

    run.json                              see ``identity``; a run that differs in it does not resume here
    checkpoint-<step>/state.safetensors   vectors: parameters, moments, and the best parameters if they differ
    checkpoint-<step>/metrics.jsonl       all metrics so far
    checkpoint-<step>/checkpoint.json     step, further values, the sha256 of both files and of itself; written last
    optimizer-pages.bin                   the optimizer's pages, left by older versions; never resumed from

The order of the data and all randomness are functions of seed and step, so this is the complete state of a run.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.layout import JOURNAL_NAME, METRICS_NAME, read_json, write_json
from adaptkit.checkpoint.manifest import read_manifest
from adaptkit.checkpoint.place import partial_folder
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.writer import (
    DiskError,
    TensorWriter,
    disk_errors,
    replaced_name,
    require_free,
    sync_folder,
    write_file,
)
from adaptkit.errors import CheckpointError, ConflictError, IntegrityError, OutputExistsError, UsageError
from adaptkit.numerics.dtypes import dtype_name
from adaptkit.numerics.spec import TensorSpec
from adaptkit.numerics.tensors import DTYPES, as_array, as_tensor
from adaptkit.training.distributed import World
from adaptkit.training.identity import RUN_NAME, changes, read_identity
from adaptkit.training.memory.vector import Vector

PAGES_NAME = "optimizer-pages.bin"
_STATE, _RECORD = "state.safetensors", "checkpoint.json"
_DAMAGE = (CheckpointError, IntegrityError, KeyError, TypeError, OSError)
"""Exceptions that reading a damaged checkpoint can raise."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run needs to resume.

    Attributes:
        step: number of steps taken.
        vectors: vectors by name. Those of a checkpoint are read lazily: its file must exist until then.
        values: JSON values by name.
        metrics: the content of ``metrics.jsonl``.
    """

    step: int
    vectors: Mapping[str, Vector]
    values: Mapping[str, Any]
    metrics: bytes


def check_unfinished(folder: Path, identity: Mapping[str, Any], force: bool, resume: bool) -> None:
    """Refuse to mix two runs, or to resume without a checkpoint.

    A run that wrote no checkpoint, such as one that was refused, left nothing that could be mixed.

    Args:
        folder: partial folder of the output.
        identity: identity of this run.
        force: allow work of another run to be discarded.
        resume: require a checkpoint.

    Raises:
        ConflictError: the folder contains work of another run; names what differs.
        UsageError: there is nothing to resume.
    """
    known = read_identity(folder)
    if known is not None and holds_work(folder) and (resume or not force):
        differences = changes(known, identity)
        if differences:
            raise ConflictError(
                f"{folder}: contains unfinished work of another run: {'; '.join(differences)}",
                hint="use the same options and inputs to resume, or start over with --force",
            )
    if resume and (known is None or _newest_whole(folder) is None):
        raise UsageError(f"{folder}: no checkpoint to resume from", hint="leave out --resume to start a run")


def check_not_finished(output: Path, force: bool, resume: bool) -> None:
    """Refuse to resume a run that is finished.

    Raises:
        OutputExistsError: the output is a trained artifact, and no partial folder exists.
    """
    if resume and not force and not partial_folder(output).exists():
        manifest = read_manifest(output) if output.is_dir() else None
        if manifest is not None and manifest.operation.get("name") == "train":
            raise OutputExistsError(
                f"{output}: the run that made this is finished; there is nothing to resume",
                hint="leave out --resume and give --force to train again, or choose another -o",
            )


def resume_step(folder: Path, identity: Mapping[str, Any]) -> int:
    """Return the step after which a run would continue: that of the newest undamaged checkpoint, or 0.

    Args:
        folder: partial folder of the output; work of another run in it does not count.
        identity: identity of this run.
    """
    known = read_identity(folder)
    if known is not None and changes(known, identity):
        return 0
    return _newest_whole(folder) or 0


def holds_work(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, or anything else that a run does not write before its first checkpoint."""
    return not all(_is_beginning(path.name) for path in folder.iterdir())


def require_room(folder: Path, checkpoint_bytes: int, keep: int) -> None:
    """Refuse a run whose checkpoints do not fit on the disk; existing checkpoints need no further space.

    Raises:
        DiskError: says how much space is missing.
    """
    needed = checkpoint_bytes * max(1, keep + 1 - len(checkpoints(folder)))
    hint = "free some space, keep fewer with --keep-checkpoints 1, or choose another -o"
    require_free(folder, needed, f"{folder}: its checkpoints need", hint)


def save_checkpoint(folder: Path, snapshot: Snapshot, keep: int) -> None:
    """Write a checkpoint atomically, and delete all but the newest ones.

    Args:
        folder: folder of the run.
        snapshot: state to write.
        keep: number of checkpoints to keep.

    Raises:
        DiskError: there is no room; earlier checkpoints are kept.
    """
    final = folder / f"checkpoint-{snapshot.step}"
    partial = folder / f"checkpoint-{snapshot.step}.partial"
    try:
        _write(partial, snapshot)
    except DiskError:
        shutil.rmtree(partial, ignore_errors=True)  # useless, and the disk is full
        raise
    if final.exists():  # damaged, or the run would have resumed from it
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(folder)
    for _, old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def _write(folder: Path, snapshot: Snapshot) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with disk_errors(folder):
        folder.mkdir()
    specs = [TensorSpec(name, dtype_name(vector.dtype), (vector.count,)) for name, vector in snapshot.vectors.items()]
    with TensorWriter(folder, _STATE, specs) as writer:
        for name, vector in snapshot.vectors.items():
            for _, piece in vector.pieces():
                writer.write(name, as_array(piece))
    metrics = write_file(folder, METRICS_NAME, snapshot.metrics)
    files = {_STATE: writer.record.sha256, METRICS_NAME: metrics.sha256}
    record = {"step": snapshot.step, "values": dict(snapshot.values), "files": files}
    write_file(folder, _RECORD, write_json(record | {"sha256": _digest(record)}))
    sync_folder(folder)


def newest_checkpoint(folder: Path, note: Callable[[str], None]) -> Snapshot | None:
    """Read the newest undamaged checkpoint, if any; call ``note`` for every damaged one."""
    left = checkpoints(folder)
    while left:
        step, path = left.pop()
        try:
            return _read(path, step)
        except _DAMAGE as error:
            what = "trying the one before it" if left else "there is none before it, so the run starts over"
            note(f"warning: {path.name} is damaged ({error}); {what}")
    return None


def share_snapshot(world: World, snapshot: Snapshot | None) -> Snapshot | None:
    """Broadcast the snapshot of rank 0, one tensor at a time, since NCCL sends it through GPU memory."""
    if world.size == 1:
        return snapshot
    shapes = {name: (vector.dtype, vector.count) for name, vector in snapshot.vectors.items()} if snapshot else {}
    outline = world.broadcast_object((replace(snapshot, vectors={}), shapes) if snapshot else None)
    if outline is None:
        return None
    vectors = {}
    for name, (dtype, count) in outline[1].items():
        moved = torch.empty(count, dtype=dtype, device=world.device)
        if snapshot is not None:
            snapshot.vectors[name].copy_to(moved)
        world.broadcast(moved)
        vectors[name] = Vector.of(moved.cpu())
    return replace(outline[0], vectors=vectors)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return step and path of all checkpoints in a folder, also damaged ones, the newest last."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def _is_beginning(name: str) -> bool:
    """Whether a run can have a file of this name before its first checkpoint, such as a partial checkpoint."""
    known = replaced_name(name) in {JOURNAL_NAME, RUN_NAME, METRICS_NAME, PAGES_NAME}
    return known or (name.startswith("checkpoint-") and name.endswith(".partial"))


def _newest_whole(folder: Path) -> int | None:
    return next((step for step, path in reversed(checkpoints(folder)) if _is_whole(path, step)), None)


def _is_whole(path: Path, step: int) -> bool:
    try:
        _checked(path, step)
    except _DAMAGE:
        return False
    return True


def _checked(path: Path, step: int) -> dict[str, Any]:
    """Return the record of a checkpoint, after checking that no file changed since it was written."""
    record = read_json(path / _RECORD)
    is_whole = (path / _RECORD).read_bytes() == write_json(record)
    if not is_whole or record.pop("sha256") != _digest(record) or record["step"] != step:
        raise IntegrityError(f"{_RECORD} changed after it was written")
    for name in (_STATE, METRICS_NAME):
        if file_sha256(path / name) != record["files"][name]:
            raise IntegrityError(f"{name} changed after it was written")
    return record


def _read_flat(files: TensorFiles, name: str, start: int, count: int) -> Tensor:
    return as_tensor(files.read_flat(name, start, count))


def _read(path: Path, step: int) -> Snapshot:
    record = _checked(path, step)
    files = TensorFiles(path, [_STATE])
    vectors = {
        name: Vector(DTYPES[located.spec.dtype], located.spec.shape[0], partial(_read_flat, files, name))
        for name, located in files.tensors.items()
    }
    return Snapshot(step, vectors, record["values"], (path / METRICS_NAME).read_bytes())


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(write_json(record)).hexdigest()
