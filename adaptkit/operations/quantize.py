"""Quantize a checkpoint to 4 or 8 bits, shard by shard and piece by piece."""

from __future__ import annotations

from adaptkit.arguments import AnyPath, as_path, as_path_or_none, check_flags, checked_options
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.errors import UsageError
from adaptkit.operations._quantize.plan import make_plan
from adaptkit.operations._quantize.report import QuantizeReport, TensorReport, Upgrade, make_report
from adaptkit.operations._quantize.writing import make_manifest, open_source, source_parents, write_checkpoint
from adaptkit.operations.options import Calibration, QuantizeOptions

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
    recorded = options.recorded()
    key = [checkpoint.outline(), recorded, plan.outline()]
    with Output(output, key, force, inputs=[checkpoint]) as out:
        out.require_space(plan.nbytes())
        write_checkpoint(out, plan, progress)
        out.require_inputs()
        operation = {"name": "quantize", "options": recorded}
        manifest = make_manifest(out, plan, operation, source_parents(out, plan))
        out.publish(manifest)
    return make_report(output, plan, out.notes, manifest)
