"""Checkpoints of a training run.

    checkpoint-<step>/state.safetensors   parameters, first and second moments, (N,) float32 each
    checkpoint-<step>/checkpoint.json     step, and the sha256 of the state; written last

The order of the data and all randomness are functions of seed and step, so this is all that a run consists of.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.header import TensorSpec
from adaptkit.checkpoint.layout import read_json, write_json
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.writer import TensorWriter, write_file
from adaptkit.errors import CheckpointError, IntegrityError

_STATE, _RECORD = "state.safetensors", "checkpoint.json"
_NAMES = ("first_moment", "parameters", "second_moment")
_KEPT = 2


@dataclass(frozen=True)
class TrainingState:
    """Everything that a run needs to go on.

    Attributes:
        step: optimizer steps taken.
        parameters: (N,) float32.
        first_moment: (N,) float32.
        second_moment: (N,) float32.
    """

    step: int
    parameters: Tensor
    first_moment: Tensor
    second_moment: Tensor


def save_checkpoint(folder: Path, state: TrainingState) -> None:
    """Write a checkpoint, whole or not at all, and remove all but the newest two."""
    final = folder / f"checkpoint-{state.step}"
    partial = folder / f"checkpoint-{state.step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    specs = [TensorSpec(name, "F32", tuple(state.parameters.shape)) for name in _NAMES]
    with TensorWriter(partial, _STATE, specs) as writer:
        for name in _NAMES:
            writer.write(name, getattr(state, name).cpu())
    write_file(partial, _RECORD, write_json({"step": state.step, "sha256": writer.record.sha256}))
    if final.exists():  # damaged, or it would have been gone on from
        shutil.rmtree(final)
    partial.rename(final)
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    for _, old in _checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old)


def newest_checkpoint(folder: Path) -> TrainingState | None:
    """Read the newest undamaged checkpoint; a damaged one is named on stderr and the one before it is taken."""
    for step, path in reversed(_checkpoints(folder)):
        try:
            return _read(path, step)
        except (CheckpointError, IntegrityError, KeyError, OSError) as error:
            print(f"warning: {path.name} is damaged ({error}); trying the one before it", file=sys.stderr)
    return None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in found if step.isdigit())


def _read(path: Path, step: int) -> TrainingState:
    if file_sha256(path / _STATE) != read_json(path / _RECORD)["sha256"]:
        raise IntegrityError(f"{_STATE} changed after it was written")
    files = TensorFiles(path, [_STATE])
    return TrainingState(step, **{name: files.read(name) for name in _NAMES})
