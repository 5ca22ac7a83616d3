"""Checkpoints of a training run.

    checkpoint-<step>/state.safetensors   float32 vectors: parameters, moments, the best parameters if they are others
    checkpoint-<step>/metrics.jsonl       everything that was measured so far
    checkpoint-<step>/checkpoint.json     step, further values, the sha256 of both files, and its own; written last

The order of the data and all randomness are functions of seed and step, so this is all that a run consists of.
"""

import hashlib
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.header import DTYPE_NAMES, TensorSpec
from adaptkit.checkpoint.layout import read_json, write_json
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.writer import TensorWriter, sync_folder, write_file
from adaptkit.errors import CheckpointError, IntegrityError
from adaptkit.training.history import METRICS_NAME

_STATE, _RECORD = "state.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run needs to go on.

    Attributes:
        step: steps taken.
        tensors: by name; on any device.
        values: by name; what JSON can hold.
        metrics: the content of ``metrics.jsonl``.
    """

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    metrics: bytes


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
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    specs = [
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in snapshot.tensors.items()
    ]
    with TensorWriter(partial, _STATE, specs) as writer:
        for name, tensor in snapshot.tensors.items():
            writer.write(name, tensor.detach().cpu())
    metrics = write_file(partial, METRICS_NAME, snapshot.metrics)
    files = {_STATE: writer.record.sha256, METRICS_NAME: metrics.sha256}
    record = {"step": snapshot.step, "values": dict(snapshot.values), "files": files}
    write_file(partial, _RECORD, write_json(record | {"sha256": _digest(record)}))
    sync_folder(partial)
    if final.exists():  # damaged, or it would have been gone on from
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(folder)
    for _, old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def newest_checkpoint(folder: Path) -> Snapshot | None:
    """Read the newest undamaged checkpoint; a damaged one is named on stderr and the one before it is taken."""
    for step, path in reversed(_checkpoints(folder)):
        try:
            return _read(path, step)
        except (CheckpointError, IntegrityError, KeyError, TypeError, OSError) as error:
            print(f"warning: {path.name} is damaged ({error}); trying the one before it", file=sys.stderr)
    return None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def _read(path: Path, step: int) -> Snapshot:
    record = read_json(path / _RECORD)
    if record.pop("sha256") != _digest(record) or record["step"] != step:
        raise IntegrityError(f"{_RECORD} changed after it was written")
    for name in (_STATE, METRICS_NAME):
        if file_sha256(path / name) != record["files"][name]:
            raise IntegrityError(f"{name} changed after it was written")
    files = TensorFiles(path, [_STATE])
    tensors = {name: files.read(name) for name in files.tensors}
    return Snapshot(step, tensors, record["values"], (path / METRICS_NAME).read_bytes())


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(write_json(record)).hexdigest()
