"""Quantize a checkpoint to 4 or 8 bits, shard by shard and piece by piece."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from adaptkit.arguments import AnyPath, as_path, as_path_or_none, check_flags, checked_options
from adaptkit.checkpoint.hashing import tensors_root
from adaptkit.checkpoint.integrity import check_config
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import CONFIG_NAME
from adaptkit.checkpoint.manifest import Manifest, Parent, Target, TensorRecord, parent_of, read_manifest
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.released import ReleasedCheckpoint, open_plain
from adaptkit.checkpoint.side_files import check_side_files
from adaptkit.errors import UsageError
from adaptkit.operations._quantize.options import Calibration, QuantizeOptions
from adaptkit.operations._quantize.plan import Plan, make_plan
from adaptkit.operations._quantize.report import QuantizeReport, TensorReport, Upgrade, make_report
from adaptkit.operations._quantize.selection import skip_modules
from adaptkit.operations._shards import unfinished_shards, write_index
from adaptkit.operations._threads import thread_count

__all__ = ["Calibration", "QuantizeOptions", "QuantizeReport", "TensorReport", "Upgrade", "quantize"]


def quantize(
    source: AnyPath,
    output: AnyPath,
    options: QuantizeOptions | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    companion: AnyPath | None = None,
    progress: Progress = no_progress,
    calibration_progress: Progress = no_progress,
) -> QuantizeReport:
    """Write a quantized copy of a checkpoint, for transformers with bitsandbytes and for adaptkit's trainer.

    Args:
        source: folder of a 16- or 32-bit safetensors checkpoint, one file or sharded, or of one released in FP8 or
            MXFP4, whose weights are decoded to bfloat16 as ``dequantize`` does.
        output: folder to make.
        options: see ``QuantizeOptions``.
        force: replace an existing output.
        dry_run: plan and validate only.
        companion: folder of the companion adapter to make, if the options ask for one; ``<output>-init`` if None.
        progress: called with bytes written.
        calibration_progress: called with steps of the calibration done, each one batch through one layer.

    Raises:
        CheckpointError: the source is malformed, quantized already, or has nothing to quantize.
        IntegrityError: config.json does not match the source's manifest.
        NonFiniteError: a weight is NaN or infinite; names tensor and index.
        OutputExistsError: the output exists.

    Source: QLoRA (arXiv:2305.14314); bytes as bitsandbytes 0.50 makes them.
    """
    check_flags(force=force, dry_run=dry_run)
    source, output = as_path(source, "source"), as_path(output, "output")
    options, companion = checked_options(options, QuantizeOptions), as_path_or_none(companion, "companion")
    check_output(output, force, [source])
    if companion is not None and (options.calibration is None or options.calibration.init_rank is None):
        raise UsageError("no companion adapter to write", hint="add --calibrate FILE and --init-adapter RANK")
    if options.calibration is not None:
        from adaptkit.operations.calibrate import quantize_calibrated  # here, since it loads torch

        both = (progress, calibration_progress)
        return quantize_calibrated(source, output, options, options.calibration, force, dry_run, companion, *both)
    checkpoint = open_source(source)
    plan = make_plan(checkpoint, options)
    if dry_run:
        return make_report(output, plan)
    recorded, state = options.recorded(), checkpoint.state()
    key, inputs = [checkpoint.outline(), recorded, plan.outline()], [[str(source.resolve()), state]]
    with Output(output, key, force, inputs=inputs) as out:
        out.require_space(plan.nbytes())
        write_checkpoint(out, plan, progress)
        checkpoint.require_state(state)
        operation = {"name": "quantize", "options": recorded}
        manifest = make_manifest(out, plan, operation, source_parents(out, plan))
        out.publish(manifest)
    return make_report(output, plan, out.notes, manifest)


def open_source(source: Path) -> Checkpoint:
    """Open a checkpoint whose weights and small files are to be quantized and copied.

    Raises:
        CheckpointError: malformed.
        IntegrityError: config.json does not match the manifest.
    """
    checkpoint = open_plain(source)
    check_side_files(source)
    check_config(source, read_manifest(source))
    return checkpoint


def write_checkpoint(out: Output, plan: Plan, progress: Progress) -> None:
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
                if isinstance(checkpoint, ReleasedCheckpoint):  # read again now, while their pages are cached
                    note["parts"] = checkpoint.fingerprints_of_parts(group.source)
                shard.notes[group.source] = note
    write_index(out, plan.shards)
    block = options.encoding.codec.config_block(skip_modules(plan.selection), options.encoding)
    out.write_json(CONFIG_NAME, checkpoint.config | {"quantization_config": block})
    for name, content in checkpoint.side_contents().items():
        out.write(name, content)


def source_records(out: Output, plan: Plan) -> list[TensorRecord]:
    """Return the records of the tensors that were quantized or copied, in 16 bits."""
    return [TensorRecord.of(c.spec, out.notes[c.spec.name]["fingerprint"]) for c in plan.selection.choices]


def source_parents(out: Output, plan: Plan) -> tuple[Parent, ...]:
    """Return the 16-bit base and, if that was only computed, the release that it was decoded from.

    Raises:
        IntegrityError: the source does not match its manifest.
    """
    checkpoint, base = plan.checkpoint, source_records(out, plan)
    manifest = read_manifest(checkpoint.root)
    if not isinstance(checkpoint, ReleasedCheckpoint):
        return (parent_of("base", manifest, base, root=checkpoint.root),)
    digests = {name: d for c in plan.selection.choices for name, d in out.notes[c.spec.name]["parts"].items()}
    release = [TensorRecord.of(located.spec, digests[name]) for name, located in checkpoint.release.tensors.items()]
    return parent_of("base", None, base), parent_of("release", manifest, release, root=checkpoint.root)


def make_manifest(out: Output, plan: Plan, operation: dict[str, Any], parents: tuple[Parent, ...]) -> Manifest:
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
