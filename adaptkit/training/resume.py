"""Checkpoints of a training run.

    run.json                              what decides about the result; a run with anything else does not go on here
    checkpoint-<step>/state.safetensors   float32 vectors: parameters, moments, the best parameters if they are others
    checkpoint-<step>/metrics.jsonl       everything that was measured so far
    checkpoint-<step>/checkpoint.json     step, further values, the sha256 of both files, and its own; written last
    optimizer-pages.bin                   of the optimizer, as older versions left it; not gone on from

The order of the data and all randomness are functions of seed and step, so this is all that a run consists of.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adaptkit.checkpoint.dtypes import DTYPES, dtype_name
from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.header import TensorSpec
from adaptkit.checkpoint.journal import JOURNAL_NAME
from adaptkit.checkpoint.layout import METRICS_NAME, read_json, write_json
from adaptkit.checkpoint.manifest import read_manifest
from adaptkit.checkpoint.place import partial_folder
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.writer import (
    DiskError,
    TensorWriter,
    disk_errors,
    replace_file,
    replaced_name,
    require_free,
    sync_folder,
    write_file,
)
from adaptkit.errors import CheckpointError, ConflictError, IntegrityError, OutputExistsError, UsageError
from adaptkit.training.distributed import World
from adaptkit.training.memory.vector import Vector

PAGES_NAME = "optimizer-pages.bin"
_RUN, _STATE, _RECORD = "run.json", "state.safetensors", "checkpoint.json"
_DAMAGE = (CheckpointError, IntegrityError, KeyError, TypeError, OSError)
"""What reading a damaged checkpoint ends in."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run needs to go on.

    Attributes:
        step: steps taken.
        vectors: by name; of one that was read in its file, which has to stay until they are.
        values: by name; what JSON can hold.
        metrics: the content of ``metrics.jsonl``.
    """

    step: int
    vectors: Mapping[str, Vector]
    values: Mapping[str, Any]
    metrics: bytes


def remember(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write down what decides about the result, so that a run that cannot go on can be told why."""
    if _read_identity(folder) is None:
        replace_file(folder / _RUN, write_json(identity))


def check_unfinished(folder: Path, identity: Mapping[str, Any], force: bool, resume: bool) -> None:
    """Refuse to mix two runs, and to begin where there was to be something to go on from.

    A run that came to no checkpoint, such as one that was refused, left nothing that could be mixed.

    Args:
        folder: where unfinished work would lie.
        identity: of the run that is to be.
        force: work of another run may be thrown away.
        resume: there has to be a checkpoint.

    Raises:
        ConflictError: the work that lies there is of another run; names what differs.
        UsageError: there is nothing to resume.
    """
    known = _read_identity(folder)
    if known is not None and holds_work(folder) and (resume or not force):
        differences = _differences(known, json.loads(write_json(identity)))
        if differences:
            raise ConflictError(
                f"{folder}: contains unfinished work of another run: {'; '.join(differences)}",
                hint="use the same options and inputs to resume, or start over with --force",
            )
    if resume and (known is None or _newest_whole(folder) is None):
        raise UsageError(f"{folder}: no checkpoint to resume from", hint="leave out --resume to start a run")


def check_alike(world: World, identity: Mapping[str, Any]) -> None:
    """Refuse processes that would train different things: their gradients say nothing together.

    Each reads files and options of its own, perhaps on another machine.

    Raises:
        UsageError: in all of them; names what differs.
    """
    mine = dict(identity)
    if not isinstance(mine["base"], str):  # of a base without a manifest: times are another machine's
        mine["base"] = [[file, size] for file, size, _ in mine["base"]]
    differences = _differences(world.share(mine), mine, "{} is {} there and {} here")
    told = [f"process {world.rank} differs from the first: {'; '.join(differences)}"] if differences else []
    told = world.collect(told)
    if told:
        raise UsageError(". ".join(told), hint="start all processes with the same options, base and data")


def check_not_finished(output: Path, force: bool, resume: bool) -> None:
    """Say of a run that is to go on, and whose output is there, that it came to its end.

    Raises:
        OutputExistsError: it did.
    """
    if resume and not force and not partial_folder(output).exists():
        manifest = read_manifest(output) if output.is_dir() else None
        if manifest is not None and manifest.operation.get("name") == "train":
            raise OutputExistsError(
                f"{output}: the run that made this is finished; there is nothing to resume",
                hint="leave out --resume and give --force to train again, or choose another -o",
            )


def going_on_from(folder: Path, identity: Mapping[str, Any]) -> int:
    """The step that a run begins after: that of the newest undamaged checkpoint, or 0.

    Args:
        folder: where unfinished work would lie; that of another run is thrown away, if it is not refused.
        identity: of the run that is to be.
    """
    known = _read_identity(folder)
    if known is not None and _differences(known, json.loads(write_json(identity))):
        return 0
    return _newest_whole(folder) or 0


def holds_work(folder: Path) -> bool:
    """Whether there is more than a run writes before its first checkpoint: that, or what is no training run's."""
    return not all(_is_beginning(path.name) for path in folder.iterdir())


def require_room(folder: Path, checkpoint_bytes: int, keep: int) -> None:
    """Refuse a run whose checkpoints the disk has no room for; those that are there have theirs already.

    Raises:
        DiskError: says how much is missing.
    """
    needed = checkpoint_bytes * max(1, keep + 1 - len(checkpoints(folder)))
    hint = "free some space, keep fewer with --keep-checkpoints 1, or choose another -o"
    require_free(folder, needed, f"{folder}: its checkpoints need", hint)


def save_checkpoint(folder: Path, snapshot: Snapshot, keep: int = 2) -> None:
    """Write a checkpoint, whole or not at all, and remove all but the newest ones.

    Args:
        folder: of the run.
        snapshot: to write.
        keep: how many stay.

    Raises:
        DiskError: there is no room; the checkpoints before it stay.
    """
    final = folder / f"checkpoint-{snapshot.step}"
    partial = folder / f"checkpoint-{snapshot.step}.partial"
    try:
        _write(partial, snapshot)
    except DiskError:
        shutil.rmtree(partial, ignore_errors=True)  # half a checkpoint is no use, and there is no room for it
        raise
    if final.exists():  # damaged, or it would have been gone on from
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
                writer.write(name, piece)
    metrics = write_file(folder, METRICS_NAME, snapshot.metrics)
    files = {_STATE: writer.record.sha256, METRICS_NAME: metrics.sha256}
    record = {"step": snapshot.step, "values": dict(snapshot.values), "files": files}
    write_file(folder, _RECORD, write_json(record | {"sha256": _digest(record)}))
    sync_folder(folder)


def newest_checkpoint(folder: Path, note: Callable[[str], None]) -> Snapshot | None:
    """Read the newest undamaged checkpoint; a damaged one is named in a note, and the one before it is taken."""
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
    """Give all processes what the first one read, a tensor at a time: on GPUs it goes through their memory."""
    if world.size == 1:
        return snapshot
    shapes = {name: (vector.dtype, vector.count) for name, vector in snapshot.vectors.items()} if snapshot else {}
    outline = world.share((replace(snapshot, vectors={}), shapes) if snapshot else None)
    if outline is None:
        return None
    vectors = {}
    for name, (dtype, count) in outline[1].items():
        moved = torch.empty(count, dtype=dtype, device=world.device)
        if snapshot is not None:
            snapshot.vectors[name].copy_to(moved)
        world.copy_first(moved)
        vectors[name] = Vector.of(moved.cpu())
    return replace(outline[0], vectors=vectors)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a folder, whole or damaged: step and path, the newest last."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def _is_beginning(name: str) -> bool:
    """Whether a run has a file of this name, whole or half, before it has a checkpoint; half a checkpoint is none."""
    known = replaced_name(name) in {JOURNAL_NAME, _RUN, METRICS_NAME, PAGES_NAME}
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
    """The record of a checkpoint whose files are those that were written."""
    record = read_json(path / _RECORD)
    is_whole = (path / _RECORD).read_bytes() == write_json(record)
    if not is_whole or record.pop("sha256") != _digest(record) or record["step"] != step:
        raise IntegrityError(f"{_RECORD} changed after it was written")
    for name in (_STATE, METRICS_NAME):
        if file_sha256(path / name) != record["files"][name]:
            raise IntegrityError(f"{name} changed after it was written")
    return record


def _read(path: Path, step: int) -> Snapshot:
    record = _checked(path, step)
    files = TensorFiles(path, [_STATE])
    vectors = {
        name: Vector(DTYPES[located.spec.dtype], located.spec.shape[0], partial(files.read_flat, name))
        for name, located in files.tensors.items()
    }
    return Snapshot(step, vectors, record["values"], (path / METRICS_NAME).read_bytes())


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(write_json(record)).hexdigest()


def _read_identity(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(folder / _RUN)
    except (CheckpointError, OSError):
        return None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], said: str = "{} was {} and is {}") -> list[str]:
    """What differs, for people; options by name, with both values."""
    options = before.get("options") or {}
    others = {"base": "base", "data": "data", "init": "adapter to start from", "chat_template": "chat template"}
    found = [
        said.format(name, *(_shown(run.get(name)) for run in (options, now["options"])))
        for name in sorted({*options, *now["options"]})
        if options.get(name) != now["options"].get(name)
    ]
    return found + [f"another {what}" for key, what in others.items() if before.get(key) != now.get(key)]


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
