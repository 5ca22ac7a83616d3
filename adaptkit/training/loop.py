"""Training from start to end: check the inputs, take the steps, publish the adapter.

    inputs.py     what is read     run.py            the steps              result.py     what is written
    schedule.py   learning rate    gradients.py      gradients of a step    resume.py     checkpoints
    history.py    metrics.jsonl    observations.py   held-out losses        trackers.py   TensorBoard, W&B

Everything that can be checked is checked before anything is written.
"""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, overload

from adaptkit.arguments import AnyPath, as_path, check_flags, checked_options
from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.integrity import check_tensors
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import METRICS_NAME, PICTURE_NAME
from adaptkit.checkpoint.manifest import FileRecord, Manifest
from adaptkit.checkpoint.place import partial_folder
from adaptkit.errors import AdaptkitError, install_hint
from adaptkit.models.model_lock import model_lock
from adaptkit.training.config import TrainConfig
from adaptkit.training.device import deterministic, without_cudnn_attention
from adaptkit.training.distributed import World, join
from adaptkit.training.dry_run import plan_run
from adaptkit.training.dtype_errors import reports_unsupported_dtype
from adaptkit.training.identity import as_recorded, check_same_inputs, record_identity
from adaptkit.training.inputs import Inputs, read_inputs
from adaptkit.training.out_of_memory import TRAIN_LESS, reports_out_of_memory
from adaptkit.training.picture import can_draw, draw
from adaptkit.training.preparation import checkpoint_bytes
from adaptkit.training.report import RunPlan, StepProgress, TrainReport, summarize
from adaptkit.training.result import write_result
from adaptkit.training.resume import (
    check_not_finished,
    check_unfinished,
    holds_work,
    require_room,
)
from adaptkit.training.run import Chosen, Run
from adaptkit.training.trackers import trackers


def to_stderr(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr)


@overload
def train(
    config: TrainConfig,
    output: AnyPath,
    *,
    force: bool = False,
    resume: bool = False,
    dry_run: Literal[False] = False,
    on_step: Callable[[StepProgress], None] = ...,
    note: Callable[[str], None] = ...,
) -> TrainReport: ...


@overload
def train(
    config: TrainConfig, output: AnyPath, *, force: bool = False, resume: bool = False, dry_run: Literal[True]
) -> RunPlan: ...


@model_lock()
@reports_out_of_memory("beside the base", hint=TRAIN_LESS)
def train(
    config: TrainConfig,
    output: AnyPath,
    *,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    on_step: Callable[[StepProgress], None] = lambda report: None,
    note: Callable[[str], None] = to_stderr,
) -> TrainReport | RunPlan:
    """Train an adapter, or with ``method: full`` a whole model. An interrupted run resumes when it is called again.

    Args:
        config: settings of the run.
        output: folder of the adapter or checkpoint to create.
        force: replace an existing output, or start over where a run with other options stopped.
        resume: resume only, do not start a run.
        dry_run: check everything up to the first step, write nothing, and return what would be done.
        on_step: called after every step.
        note: called with a one-line message on everything else: answers to prompts, skipped steps, early stopping.

    Raises:
        CheckpointError, UsageError, DataError: base, targets or data cannot be used, there is nothing to resume, or
            memory runs out.
        IntegrityError: the base does not match its manifest.
        NonFiniteError: loss or gradient is NaN or infinite; names the step and the samples.
        ConflictError: the output exists, or contains unfinished work of another run; names what differs.
        DiskError: there is no room for a checkpoint; the previous one is kept.

    Under torchrun, every process returns the report of rank 0, and only rank 0 writes and calls on_step and note.

    Source: QLoRA (arXiv:2305.14314); NF4 storage, bfloat16 compute, paged optimizer state.
    """
    check_flags(force=force, resume=resume, dry_run=dry_run)
    output, config = as_path(output, "output"), checked_options(config, TrainConfig, "config")
    if dry_run:
        return plan_run(config, output, force=force, resume=resume)
    check_not_finished(output, force, resume)
    with without_cudnn_attention(), deterministic(config.deterministic), join(config.device) as world:
        # Read inputs only after joining: a process waiting in join() would not see another's error.
        inputs = read_inputs(config, output, force)
        identity = inputs.identity()
        check_same_inputs(world, identity)
        with reports_unsupported_dtype(inputs.base, inputs.config.compute_dtype):
            if world.is_first:
                report = _train_on_rank_zero(inputs, identity, output, force, resume, on_step, note, world)
            else:
                run = Run(inputs, Path(tempfile.gettempdir()), lambda text: None, world)
                run.train(lambda step: None)
                report = None
        shared = world.broadcast_object(report)
    if shared is None:
        raise ValueError("the first process made no report")
    return shared


def _train_on_rank_zero(
    inputs: Inputs,
    identity: Mapping[str, Any],
    output: Path,
    force: bool,
    resume: bool,
    on_step: Callable[[StepProgress], None],
    note: Callable[[str], None],
    world: World,
) -> TrainReport:
    """Train in rank 0, or in the only process; see ``train``."""
    identity = as_recorded(partial_folder(output), identity, inputs.contents)
    check_unfinished(partial_folder(output), identity, force, resume)
    check_tensors(inputs.base, inputs.manifest)  # the result's manifest vouches for its base
    with Output(output, identity, force, keeps=holds_work, discards=False) as out:
        record_identity(out.folder, identity, inputs.contents)
        run = _create_run(inputs, out, note, world)
        with trackers(inputs.config, identity, run.resumed_from) as opened:
            run.train(on_step, opened)
        inputs.require_base()
        kept, *others = run.chosen()
        for adapter in others:
            note(f"{adapter.name}/ contains the adapter after step {adapter.step}")
            _write_beside(out, inputs, run, adapter)
        manifest = _write(out, inputs, run, kept, note)
    return _report(output, inputs, run, kept.step, manifest)


def _create_run(inputs: Inputs, out: Output, note: Callable[[str], None], world: World) -> Run:
    """Create the run; if it is refused, discard the output folder."""
    try:
        run = Run(inputs, out.folder, note, world)
        needed = checkpoint_bytes(inputs.config, run.trainable.values.numel())
        require_room(out.folder, needed, inputs.config.keep_checkpoints)
    except AdaptkitError:
        with contextlib.suppress(OSError):  # the original error matters more than cleaning up
            out.discard()
        raise
    return run


def _write(out: Output, inputs: Inputs, run: Run, kept: Chosen, note: Callable[[str], None]) -> Manifest:
    run.trainable.values.copy_(kept.parameters)
    out.write(METRICS_NAME, run.history.content())
    if can_draw():
        out.write(PICTURE_NAME, draw(run.history))
    else:
        note(f"no {PICTURE_NAME}: matplotlib is not installed ({install_hint('report')})")
    manifest = _write_result(out, inputs, run)
    out.publish(manifest)
    return manifest


def _write_result(out: Output, inputs: Inputs, run: Run) -> Manifest:
    data = [source.sha256 for source in inputs.data.sources]
    return write_result(
        out, run.model, inputs.config, inputs.manifest, inputs.records, inputs.start, data, inputs.side_files
    )


def _write_beside(out: Output, inputs: Inputs, run: Run, adapter: Chosen) -> None:
    """Write the other adapter of the run as a complete artifact in a subfolder."""
    inside = out.folder / adapter.name
    shutil.rmtree(inside, ignore_errors=True)  # left by a run that was killed here
    values, last = run.trainable.values, None
    if adapter.parameters is not values:
        last = values.to("cpu", copy=True)  # the device may be full
        values.copy_(adapter.parameters)
    with Output(inside, inputs.identity(), discards=False) as nested:
        nested.publish(_write_result(nested, inputs, run))
    if last is not None:
        values.copy_(last)
    for path in sorted(inside.iterdir()):
        name = path.relative_to(out.folder).as_posix()
        out.files.append(FileRecord(name, path.stat().st_size, file_sha256(path)))


def _report(output: Path, inputs: Inputs, run: Run, kept: int, manifest: Manifest) -> TrainReport:
    held_out = run.history.held_out
    return TrainReport(
        **summarize(output, inputs, run.batches, run.model, run.trainable, run.activations),
        steps=run.done,
        kept_step=kept,
        skipped=sum("skipped" in line for line in run.history.lines()),
        resumed_from=run.resumed_from,
        held_out_before=held_out.get(0),
        held_out_after=held_out.get(kept),
        memory=run.memory(),
        paging=run.optimizer.state.pages.metrics(),
        tokens_per_second=run.tokens_per_second,
        tensors_root=manifest.tensors_root,
        manifest_sha256=manifest.sha256,
    )
