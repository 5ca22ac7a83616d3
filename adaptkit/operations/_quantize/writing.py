"""Write the files of a quantized checkpoint, by its plan, and describe them in a manifest."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.decoded import DecodedCheckpoint, open_plain
from adaptkit.checkpoint.integrity import read_input_manifest
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import CONFIG_NAME
from adaptkit.checkpoint.manifest import Manifest, Parent, Target, TensorRecord, parent_of, read_manifest, tensors_root
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.side_files import check_side_files
from adaptkit.operations._quantize.plan import QuantizePlan
from adaptkit.operations._quantize.selection import skip_modules
from adaptkit.operations._shards import unfinished_shards, write_index
from adaptkit.operations._threads import thread_count


def open_source(source: Path) -> Checkpoint:
    """Open a checkpoint whose weights and small files are to be quantized and copied.

    Raises:
        CheckpointError: malformed.
        IntegrityError: config.json does not match the manifest.
    """
    checkpoint = open_plain(source)
    check_side_files(source)
    read_input_manifest(source)
    return checkpoint


def write_checkpoint(out: Output, plan: QuantizePlan, progress: Progress) -> None:
    """Write everything but the manifest.

    Args:
        out: the folder being written; its notes get what ``TensorPlan.write`` returns, by the source tensor's name.
        plan: the plan.
        progress: called with bytes written.
    """
    checkpoint, options = plan.checkpoint, plan.options
    unfinished = unfinished_shards(
        out,
        plan.shards,
        jobs=lambda group: plan.tensors[group.source].jobs(checkpoint),
        threads=thread_count(options.threads),
        progress=progress,
    )
    with closing(unfinished):
        for shard in unfinished:
            for group, pieces in shard.work:
                note = plan.tensors[group.source].write(pieces, shard.writer)
                if isinstance(checkpoint, DecodedCheckpoint):  # read again now, while their pages are cached
                    note["parts"] = checkpoint.fingerprints_of_parts(group.source)
                shard.notes[group.source] = note
    write_index(out, plan.shards)
    block = options.encoding.codec.config_block(skip_modules(plan.selection), options.encoding)
    out.write_json(CONFIG_NAME, checkpoint.config | {"quantization_config": block})
    for name, content in checkpoint.side_contents().items():
        out.write(name, content)


def source_records(out: Output, plan: QuantizePlan) -> list[TensorRecord]:
    """Return the records of the tensors that were quantized or copied, in 16 bits."""
    return [TensorRecord.of(c.spec, out.notes[c.spec.name]["fingerprint"]) for c in plan.selection.choices]


def source_parents(out: Output, plan: QuantizePlan) -> tuple[Parent, ...]:
    """Return the 16-bit base and, if that was only computed, the release that it was decoded from.

    Raises:
        IntegrityError: the source does not match its manifest.
    """
    checkpoint, base = plan.checkpoint, source_records(out, plan)
    manifest = read_manifest(checkpoint.root)
    if not isinstance(checkpoint, DecodedCheckpoint):
        return (parent_of("base", manifest, base, root=checkpoint.root),)
    digests = {name: d for c in plan.selection.choices for name, d in out.notes[c.spec.name]["parts"].items()}
    release = [TensorRecord.of(located.spec, digests[name]) for name, located in checkpoint.stored.tensors.items()]
    return parent_of("base", None, base), parent_of("release", manifest, release, root=checkpoint.root)


def make_manifest(out: Output, plan: QuantizePlan, operation: dict[str, Any], parents: tuple[Parent, ...]) -> Manifest:
    """Describe a quantized checkpoint whose files are all written."""
    written = {tensor.name: tensor for tensor in out.tensors}
    targets = []
    for choice in plan.quantized():
        name = choice.spec.name
        root = tensors_root(written[spec.name] for spec in plan.groups[name].specs)
        targets.append(Target(choice.module, choice.spec.shape, out.notes[name]["fingerprint"], root))
    return Manifest(
        kind="quantized",
        operation=operation,
        files=tuple(out.files),
        tensors=tuple(out.tensors),
        parents=parents,
        targets=tuple(targets),
    )
