"""Quantize a checkpoint by what its linear layers read on a text, and offset what is lost by a companion adapter.

The linears are quantized layer by layer, into scratch files of the output; ``quantize`` writes them as they are. A run
that was cut off after that does not calibrate again.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from adaptkit.checkpoint.adapter import write_adapter
from adaptkit.checkpoint.compensation import write_compensation
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest, parent_of, read_manifest
from adaptkit.checkpoint.place import check_output, partial_folder
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.writer import write_file
from adaptkit.errors import AdaptkitError, UsageError
from adaptkit.numerics.lora import LowRank
from adaptkit.operations._calibrate.budget import spend
from adaptkit.operations._calibrate.calibrated import (
    check_finite,
    companion_modules,
    encode_linears,
    is_calibrated,
    scratch_bytes,
)
from adaptkit.operations._calibrate.text import read_calibration
from adaptkit.operations._quantize.plan import make_plan
from adaptkit.operations._quantize.report import QuantizeReport, Upgrade, make_report
from adaptkit.operations._quantize.writing import make_manifest, open_source, source_parents, write_checkpoint
from adaptkit.operations._threads import thread_count
from adaptkit.operations.options import Calibration, QuantizeOptions


def quantize_calibrated(
    source: Path,
    output: Path,
    options: QuantizeOptions,
    calibration: Calibration,
    force: bool,
    dry_run: bool,
    companion: Path | None,
    progress: Progress,
    calibration_progress: Progress,
) -> QuantizeReport:
    """Do what ``quantize`` documents, for options with a calibration.

    Raises:
        DataError: the text cannot be read.
        NonFiniteError: a weight or an activation is NaN or infinite.
        UsageError: transformers cannot run the checkpoint, the bits budget is too small, or there is nothing for a
            companion to offset.
    """
    rank, bits, init = calibration.init_rank, calibration.bits_budget, None
    if rank is not None:
        init = companion or output.with_name(f"{output.name}-init")
        _check_apart(output, init)
        check_output(init, force or _is_waiting(init, output), [source])
    checkpoint = open_source(source)
    tokens = read_calibration(source, calibration)
    plan = make_plan(checkpoint, options)
    if dry_run:
        return make_report(output, plan)
    threads, recorded = thread_count(options.threads), options.recorded()
    key = [checkpoint.outline(), recorded, plan.outline()]
    keeps = partial(_has_published, init, output)
    upgrades: list[Upgrade] = []
    with Output(output, key, force, keeps, [checkpoint]) as out:
        out.require_space(plan.nbytes() + scratch_bytes(plan.tensors.values(), rank))
        if not is_calibrated(out):
            check_finite(checkpoint, plan.tensors.values(), threads)
        if bits is not None:
            plan, upgrades = spend(out, checkpoint, plan, tokens, bits, threads, calibration_progress)
            out.require_space(plan.nbytes() + scratch_bytes(plan.tensors.values(), rank))
        encoded = encode_linears(
            out,
            checkpoint,
            plan.tensors,
            tokens,
            compensate=calibration.compensate,
            init_rank=rank,
            threads=threads,
            progress=calibration_progress,
        )
        if init is not None and not encoded:
            raise UsageError(
                "init_adapter: nothing to offset, since every weight that the text reaches stays in 16 bits",
                hint="lower --bits-budget, or leave out --init-adapter",
            )
        plan = replace(plan, tensors={**plan.tensors, **encoded})
        write_checkpoint(out, plan, progress)
        out.require_inputs()
        operation = {"name": "quantize", "options": recorded}
        manifest = make_manifest(out, plan, operation, source_parents(out, plan))
        if init is None:
            out.publish(manifest)
        else:
            transposed = any(tensor.transposed for tensor in encoded.values())
            _publish_both(out, manifest, init, companion_modules(encoded), force, transposed)
    report = make_report(output, plan, out.notes, manifest)
    return replace(report, upgrades=tuple(upgrades), companion=str(init) if init else None)


def _check_apart(output: Path, companion: Path) -> None:
    """Refuse a companion adapter in the folder of its base, or vice versa."""
    one, other = (Path(os.path.realpath(folder)) for folder in (output, companion))
    for inner, outer in ((one, other), (other, one)):
        if inner.is_relative_to(outer) or inner.is_relative_to(partial_folder(outer)):
            raise UsageError(
                f"{companion}: the companion adapter needs a folder outside {output}",
                hint="choose another --init-adapter-output",
            )


def _is_waiting(companion: Path, output: Path) -> bool:
    """Whether the companion adapter is published but its finished base is not, since the run ended in between."""
    try:
        adapter, base = read_manifest(companion), read_manifest(partial_folder(output))
    except AdaptkitError:
        return False
    return adapter is not None and base is not None and parent_of("base", base, ()) in adapter.parents


def _has_published(companion: Path | None, output: Path, _: Path) -> bool:
    """Whether the unfinished output must be kept, because its companion adapter is published already."""
    return companion is not None and _is_waiting(companion, output)


def _publish_both(
    out: Output, manifest: Manifest, folder: Path, modules: dict[str, LowRank], force: bool, transposed: bool
) -> None:
    """Write the companion adapter, and publish both folders, one right after the other.

    Args:
        out: the base, completely written.
        manifest: of the base.
        folder: of the adapter.
        modules: the adapter's matrices, by dotted path.
        force: replace an existing adapter.
        transposed: whether the base stores its weights as (in, out).
    """
    write_file(out.folder, MANIFEST_NAME, manifest.to_bytes())  # see ``_is_waiting``
    with Output(folder, manifest.sha256, force or _is_waiting(folder, out.final), discards=False) as adapter:
        write_adapter(adapter, modules, out.final.name, fan_in_fan_out=transposed)
        write_compensation(adapter, modules)
        described = Manifest(
            kind="adapter",
            operation=manifest.operation,
            files=tuple(adapter.files),
            tensors=tuple(adapter.tensors),
            parents=(parent_of("base", manifest, ()),),
            targets=tuple(target for target in manifest.targets if target.module in modules),
        )
        adapter.publish(described)
        out.publish(manifest)
