"""What a run tells: after every step, at its end, and before it begins what it and its plan have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.data.batches import Batches
from adaptkit.training.data_report import DataReport, report_data
from adaptkit.training.inputs import Inputs
from adaptkit.training.memory.activations import Activations
from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.network.groups import has_groups
from adaptkit.training.network.model import Model


@dataclass(frozen=True)
class StepProgress:
    """One optimizer step.

    Attributes:
        step: number of the step, from 1.
        steps: number of steps of the run.
        loss: mean over the answer tokens of the step; NaN if it was skipped.
        tokens_per_second: mean rate since this process started, over all tokens except padding.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float


@dataclass(frozen=True)
class RunSummary:
    """What is known of a run before its first step.

    Attributes:
        output: folder of the adapter or checkpoint.
        samples: number of samples to train on.
        truncated: number of samples cut to ``max_length``.
        dropped: number of samples left out, because they are too long or have no answer tokens after the cut.
        data: where samples came from, and which were cut or dropped.
        trainable_parameters: number of trained parameters.
        segments: number of segments that activation checkpointing cuts the layers into; 0 if it is off.
        checkpointing: which layers are checkpointed, in words.
        compute_dtype: dtype of activations and dequantized weights.
        decoded_by: what decodes a base that no kernel decodes; empty for any other.
    """

    output: str
    samples: int
    truncated: int
    dropped: int
    data: DataReport
    trainable_parameters: int
    segments: int
    checkpointing: str
    compute_dtype: str
    decoded_by: str


def summarize(
    output: Path, inputs: Inputs, batches: Batches, model: Model, trainable: Trainable, activations: Activations
) -> dict[str, Any]:
    """Return the fields of ``RunSummary``."""
    return {
        "output": str(output),
        "samples": len(inputs.samples),
        "truncated": inputs.data.truncated,
        "dropped": inputs.data.dropped,
        "data": report_data(inputs, batches),
        "trainable_parameters": trainable.values.numel(),
        "segments": activations.checkpointing.segments,
        "checkpointing": str(activations.checkpointing),
        "compute_dtype": inputs.config.compute_dtype,
        "decoded_by": "plain torch" if has_groups(model.network) else "",
    }


@dataclass(frozen=True)
class RunPlan(RunSummary):
    """What a run would do.

    Attributes:
        steps: number of optimizer steps.
        warmup_steps: number of them in the learning rate warm-up.
        resumed_from: step of this run's newest undamaged checkpoint; 0 if there is none.
        held_out: number of held-out samples.
        tokens: tokens of the samples to train on, each sample counted once.
        answer_tokens: how many of these carry loss.
        left_out: one line on layers that targets for every linear layer leave out; empty if there are none.
        cannot_be_merged: one line on why the adapter cannot be merged; empty if it can.
        peft_drops: one line on the parts of the adapter that peft will not find; empty if it finds all.
        predicted_bytes: memory that each process of the run will need on its device; None with ``shard_base``.
        free_bytes: memory that the device has free; None with ``shard_base`` or if the system does not say.
        checkpoint_bytes: size of one checkpoint.
        disk_bytes: size of all checkpoints that exist at a time.
    """

    steps: int
    warmup_steps: int
    resumed_from: int
    held_out: int
    tokens: int
    answer_tokens: int
    left_out: str
    cannot_be_merged: str
    peft_drops: str
    predicted_bytes: int | None
    free_bytes: int | None
    checkpoint_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class TrainReport(RunSummary):
    """What a run did.

    Attributes:
        steps: number of steps taken.
        kept_step: step after which the published parameters were saved.
        skipped: number of steps skipped because loss or gradient was NaN or infinite.
        resumed_from: step at which this process resumed; 0 if it started the run.
        held_out_before: mean loss per answer token on the held-out samples before training; None without any.
        held_out_after: the same for the published parameters; None if it was not measured.
        memory: predicted bytes, by part (see ``models.memory.Memory``) and in total as ``predicted``; and as
            ``measured`` the growth of the process's memory, or on a GPU of its allocations; None if unavailable.
        paging: page table of the optimizer state and the pages moved; see ``paging.Pages.metrics``.
        tokens_per_second: mean rate since this process started, over all tokens except padding.
        tensors_root: sha256 over the names and hashes of all written tensors.
        manifest_sha256: sha256 of the manifest.
    """

    steps: int
    kept_step: int
    skipped: int
    resumed_from: int
    held_out_before: float | None
    held_out_after: float | None
    memory: dict[str, int | None]
    paging: dict[str, int]
    tokens_per_second: float
    tensors_root: str
    manifest_sha256: str
