"""Training from beginning to end: inputs are checked, a run takes its steps, an adapter appears.

inputs.py     what is read        run.py        the steps           result.py    what is written
schedule.py   the rate            history.py    metrics.jsonl       resume.py    checkpoints

Nothing is written before everything that can be checked is.
"""

from collections.abc import Callable
from pathlib import Path

from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import Manifest
from adaptkit.training.config import TrainConfig
from adaptkit.training.history import METRICS_NAME
from adaptkit.training.inputs import Inputs, read_inputs
from adaptkit.training.report import StepReport, TrainReport
from adaptkit.training.result import write_result
from adaptkit.training.run import Run


def train(
    config: TrainConfig,
    output: Path,
    *,
    force: bool = False,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> TrainReport:
    """Train a LoRA adapter on an NF4 base.

    Args:
        config: the run.
        output: folder of the adapter to make.
        force: replace an existing adapter, or begin anew where a run with other options stopped.
        on_step: told of every step.

    Raises:
        CheckpointError, UsageError, DataError: base, targets or data cannot be used.
        NonFiniteError: the loss is no number; names the step.
        ConflictError: the output exists, or unfinished work of another run lies there.

    Source: QLoRA (arXiv:2305.14314); NF4 storage, bfloat16 compute, paged optimizer state.
    """
    inputs = read_inputs(config, output, force)
    with Output(output, inputs.identity(), force, keep_work=True) as out:
        run = Run(inputs, out.folder)
        run.train(on_step)
        run.close()
        out.write(METRICS_NAME, run.history.content())
        manifest = write_result(out, run.model, config, inputs.manifest, inputs.start, inputs.data_sha256)
        out.publish(manifest)
    return _report(output, inputs, run, manifest)


def _report(output: Path, inputs: Inputs, run: Run, manifest: Manifest) -> TrainReport:
    held_out = run.history.values("held_out_loss")
    return TrainReport(
        output=str(output),
        steps=run.steps,
        resumed_from=run.resumed_from,
        trainable_parameters=run.trainable.values.numel(),
        samples=len(inputs.samples),
        truncated=inputs.data.truncated,
        dropped=inputs.data.dropped,
        held_out_before=held_out[0] if held_out else None,
        held_out_after=held_out[-1] if held_out else None,
        segments=run.segments,
        paging=run.optimizer.state.metrics(),
        tokens_per_second=run.tokens_per_second,
        tensors_root=manifest.tensors_root,
        manifest_sha256=manifest.sha256,
    )
