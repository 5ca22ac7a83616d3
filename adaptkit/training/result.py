"""Write what a run made: an adapter, and the manifest that says what it belongs to."""

from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter import Adapter, write_adapter
from adaptkit.checkpoint.compensation import write_compensation
from adaptkit.checkpoint.hashing import fingerprint
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import Manifest, Target, TensorRecord, parent_of
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.training.config import TrainConfig
from adaptkit.training.model import Model


def write_result(
    out: Output,
    model: Model,
    config: TrainConfig,
    base: Manifest | None,
    start: Adapter | None,
    data_sha256: list[str],
) -> Manifest:
    """Write the adapter, and describe it and everything else in the folder.

    Args:
        out: the folder being written.
        model: trained.
        config: of the run.
        base: manifest of the base, if it has one.
        start: what the run began with, if not with fresh matrices.
        data_sha256: of the data files.
    """
    changes = model.changes()
    extra: dict[str, Any] = {"lora_dropout": config.dropout, "fan_in_fan_out": model.stores_transposed}
    if set(changes) == set(model.linears):  # says the same as every path, and is how people write it
        extra["target_modules"] = sorted({name.rpartition(".")[2] for name in changes})
    write_adapter(out, changes, Path(config.base).resolve().name, **extra)
    if start is not None and start.compensation:
        write_compensation(out, start.compensation)
    known = {target.module: target for target in base.targets} if base else {}
    targets = [known.get(name, Target(name, change.shape)) for name, change in changes.items()]
    parents = [parent_of("base", base, () if base else _records(model.checkpoint))]
    if start is not None:
        parents.append(parent_of("init", start.manifest, start.records))
    return Manifest(
        kind="adapter",
        operation={"name": "train", "options": config.recorded() | {"data_sha256": data_sha256}},
        files=tuple(out.files),
        tensors=tuple(out.tensors),
        parents=tuple(parents),
        targets=tuple(targets),
    )


def _records(checkpoint: Checkpoint) -> list[TensorRecord]:
    """The tensors of a base without a manifest."""
    return [
        TensorRecord(name, "", located.spec.dtype, located.spec.shape, fingerprint(checkpoint.read(name)))
        for name, located in checkpoint.tensors.items()
    ]
