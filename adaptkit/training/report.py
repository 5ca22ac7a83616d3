"""Reports of a run: one after every step, and one at the end."""

from dataclasses import dataclass

from adaptkit.training.data_report import DataReport


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
class TrainReport:
    """What a run did.

    Attributes:
        output: folder of the adapter or checkpoint.
        steps: number of steps taken.
        kept_step: step after which the published parameters were saved.
        skipped: number of steps skipped because loss or gradient was NaN or infinite.
        resumed_from: step at which this process resumed; 0 if it started the run.
        trainable_parameters: number of trained parameters.
        samples: number of samples trained on.
        truncated: number of samples cut to ``max_length``.
        dropped: number of samples left out, because they are too long or have no answer tokens after the cut.
        data: where samples came from, and which were cut or dropped.
        held_out_before: mean loss per answer token on the held-out samples before training; None without any.
        held_out_after: the same for the published parameters; None if it was not measured.
        segments: number of segments that activation checkpointing cuts the layers into; 0 if it is off.
        checkpointing: which layers are checkpointed, in words.
        compute_dtype: dtype of activations and dequantized weights.
        memory: predicted bytes, by part (see ``models.memory.Memory``) and in total as ``predicted``; and as
            ``measured`` the growth of the process's memory, or on a GPU of its allocations; None if unavailable.
        paging: page table of the optimizer state and the pages moved; see ``paging.Pages.metrics``.
        tokens_per_second: mean rate since this process started, over all tokens except padding.
        tensors_root: sha256 over the names and hashes of all written tensors.
        manifest_sha256: sha256 of the manifest.
    """

    output: str
    steps: int
    kept_step: int
    skipped: int
    resumed_from: int
    trainable_parameters: int
    samples: int
    truncated: int
    dropped: int
    data: DataReport
    held_out_before: float | None
    held_out_after: float | None
    segments: int
    checkpointing: str
    compute_dtype: str
    memory: dict[str, int | None]
    paging: dict[str, int]
    tokens_per_second: float
    tensors_root: str
    manifest_sha256: str
