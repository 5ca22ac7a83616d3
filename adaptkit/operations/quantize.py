"""Quantize a checkpoint to 4 or 8 bits, shard by shard and piece by piece.

Modules for calibration are imported where they are used: loading them takes as long as quantizing a small checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.arguments import AnyPath, as_path, as_path_or_none, check_flags, checked_options
from adaptkit.checkpoint.integrity import check_config
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import CONFIG_NAME
from adaptkit.checkpoint.manifest import Manifest, read_manifest
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.released import ReleasedCheckpoint, open_plain
from adaptkit.checkpoint.side_files import check_side_files
from adaptkit.errors import DataError, UsageError
from adaptkit.operations._discard import discard_on_bad_input
from adaptkit.operations._quantize.manifest import make_manifest
from adaptkit.operations._quantize.plan import Calibration, Plan, QuantizeOptions, make_plan
from adaptkit.operations._quantize.report import QuantizeReport, TensorReport, Upgrade, make_report
from adaptkit.operations._quantize.selection import skip_modules
from adaptkit.operations._quantize.tensor_plan import Encoded, check_finite
from adaptkit.operations._roles import find_roles
from adaptkit.operations._shards import Group, write_index, write_shards
from adaptkit.operations._threads import thread_count

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.checkpoint.writer import TensorWriter
    from adaptkit.operations._calibrate.calibrated import Ready

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
    options = checked_options(options, QuantizeOptions)
    check_output(output, force, [source])
    if (init := _companion_folder(output, as_path_or_none(companion, "companion"), options)) is not None:
        from adaptkit.operations._calibrate.companion import check_apart, is_waiting

        check_apart(output, init)
        check_output(init, force or is_waiting(init, output), [source])
    checkpoint = open_plain(source)
    check_side_files(source)
    check_config(source, read_manifest(source))
    read = _read_tokens(source, options.calibration)
    return _plan_and_run(_Run(checkpoint, output, options, force, init, read, progress, calibration_progress), dry_run)


def quantize_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    options: QuantizeOptions,
    *,
    force: bool,
    progress: Progress,
    describe: Callable[[Manifest], Manifest],
) -> QuantizeReport:
    """Quantize a checkpoint that need not be a folder, such as a merged model that is never written in 16 bits.

    Args:
        checkpoint: the source.
        output: folder to make.
        options: see ``QuantizeOptions``; without calibration.
        force: replace an existing output.
        progress: called with bytes written.
        describe: called with the manifest that ``quantize`` would write; returns the one to write instead.
    """
    return _plan_and_run(
        _Run(checkpoint, output, options, force, None, None, progress, no_progress, describe), dry_run=False
    )


def _plan_and_run(run: _Run, dry_run: bool) -> QuantizeReport:
    plan = make_plan(run.checkpoint, run.options, find_roles(run.checkpoint))
    return make_report(run.output, plan, {}) if dry_run else run.finish(plan)


@dataclass(frozen=True)
class _Run:
    """The parameters of a run."""

    checkpoint: Checkpoint
    output: Path
    options: QuantizeOptions
    force: bool
    init: Path | None
    tokens: Tensor | None
    progress: Progress
    calibration_progress: Progress
    describe: Callable[[Manifest], Manifest] | None = None

    def finish(self, begun: Plan) -> QuantizeReport:
        """Execute a plan."""
        options, recorded = self.options, self.options.recorded()
        key = [self.checkpoint.outline(), recorded, begun.outline()]
        state = self.checkpoint.state()
        inputs = [[str(self.checkpoint.root.resolve()), state]]
        with Output(self.output, key, self.force, self._keeps, inputs) as out, discard_on_bad_input(out):
            out.require_space(self._required_bytes(begun))
            self._check_finite(out, begun)
            plan, upgrades = self._spend(out, begun)
            out.require_space(self._required_bytes(plan))
            ready = self._calibrate(out, plan)
            if self.init is not None and not ready:
                raise UsageError(
                    "init_adapter: nothing to offset, since every weight that the text reaches stays in 16 bits",
                    hint="lower --bits-budget, or leave out --init-adapter",
                )
            self._write(out, plan, ready)
            self.checkpoint.require_state(state)
            report = partial(make_report, self.output, plan, out.notes, upgrades)
            _write_others(out, plan, options)
            manifest = make_manifest(out, plan, recorded, None if self.describe else self.checkpoint)
            manifest = self.describe(manifest) if self.describe else manifest
            if self.init is None:
                out.publish(manifest)
            else:
                self._publish_both(out, manifest, self.init, ready)
        return replace(
            report(),
            companion=str(self.init) if self.init else None,
            tensors_root=manifest.tensors_root,
            manifest_sha256=manifest.sha256,
        )

    def _keeps(self, folder: Path) -> bool:
        """Whether the unfinished output must be kept, because its companion adapter is published already."""
        if self.init is None:
            return False
        from adaptkit.operations._calibrate.companion import is_waiting

        return is_waiting(self.init, self.output)

    def _required_bytes(self, plan: Plan) -> int:
        """Return the disk space that the whole output needs, in bytes."""
        calibration = self.options.calibration
        if calibration is None:
            return plan.nbytes()
        from adaptkit.operations._calibrate.calibrated import scratch_bytes

        return plan.nbytes() + scratch_bytes(plan.tensors.values(), calibration.init_rank)

    def _check_finite(self, out: Output, plan: Plan) -> None:
        """Look for NaN and infinity before a calibration that may take hours, unless it is already done."""
        if self.tokens is None:
            return
        from adaptkit.operations._calibrate.calibrated import is_calibrated

        if not is_calibrated(out):
            check_finite(self.checkpoint, plan.tensors.values(), thread_count(self.options.threads))

    def _spend(self, out: Output, plan: Plan) -> tuple[Plan, list[Upgrade]]:
        calibration = self.options.calibration
        if calibration is None or calibration.bits_budget is None or self.tokens is None:
            return plan, []
        from adaptkit.operations._calibrate.budget import spend

        bits, threads = calibration.bits_budget, thread_count(self.options.threads)
        return spend(out, self.checkpoint, plan, self.tokens, bits, threads, self.calibration_progress)

    def _calibrate(self, out: Output, plan: Plan) -> dict[str, Ready]:
        calibration = self.options.calibration
        if calibration is None or self.tokens is None:
            return {}
        from adaptkit.operations._calibrate.calibrated import calibrate

        return calibrate(
            out,
            self.checkpoint,
            plan.tensors,
            self.tokens,
            compensate=calibration.compensate,
            init_rank=calibration.init_rank,
            threads=thread_count(self.options.threads),
            progress=self.calibration_progress,
        )

    def _write(self, out: Output, plan: Plan, ready: Mapping[str, Ready]) -> None:
        tensors = {**plan.tensors, **ready}

        def assemble(group: Group, results: Iterator[Encoded], writer: TensorWriter) -> dict[str, Any]:
            note = tensors[group.source].assemble(results, writer)
            if isinstance(self.checkpoint, ReleasedCheckpoint):  # read again now, while their pages are cached
                note["parts"] = self.checkpoint.fingerprints_of_parts(group.source)
            return note

        write_shards(
            out,
            plan.shards,
            jobs=lambda group: tensors[group.source].jobs(self.checkpoint),
            assemble=assemble,
            threads=thread_count(self.options.threads),
            progress=self.progress,
        )

    def _publish_both(self, out: Output, manifest: Manifest, companion: Path, ready: Mapping[str, Ready]) -> None:
        from adaptkit.operations._calibrate.calibrated import companion_modules
        from adaptkit.operations._calibrate.companion import publish_both

        transposed = any(tensor.transposed for tensor in ready.values())
        publish_both(out, manifest, companion, companion_modules(ready), self.force, transposed)


def _read_tokens(source: Path, calibration: Calibration | None) -> Tensor | None:
    if calibration is None:
        return None
    for file in calibration.files:
        if file.is_fifo():  # it is read twice: for the tokens, and for the hash in the manifest
            raise DataError(f"{file}: is a pipe, which can be read only once", hint="save it in a file")
    from adaptkit.text.windows import read_tokens

    return read_tokens(calibration.files, source, window=calibration.window, max_tokens=calibration.tokens)


def _companion_folder(output: Path, companion: Path | None, options: QuantizeOptions) -> Path | None:
    wanted = options.calibration is not None and options.calibration.init_rank is not None
    if companion is not None and not wanted:
        raise UsageError("no companion adapter to write", hint="add --calibrate FILE and --init-adapter RANK")
    return (companion or output.with_name(f"{output.name}-init")) if wanted else None


def _write_others(out: Output, plan: Plan, options: QuantizeOptions) -> None:
    """Write everything but the weights and the manifest."""
    write_index(out, plan.shards)
    kept = skip_modules(plan.selection)
    block = options.encoding.codec.config_block(kept, options.encoding)
    config = plan.checkpoint.config | {"quantization_config": block}
    out.write_json(CONFIG_NAME, config)
    for name, content in plan.checkpoint.side_contents().items():
        out.write(name, content)
