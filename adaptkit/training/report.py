"""What a run tells while it goes on, and at its end."""

from dataclasses import dataclass

from adaptkit.training.data_report import DataReport


@dataclass(frozen=True)
class StepReport:
    """One optimizer step.

    Attributes:
        step: from 1.
        steps: of the run.
        loss: mean over the batch's answer tokens.
        tokens_per_second: of all tokens, padding aside.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float


@dataclass(frozen=True)
class TrainReport:
    """What a run did.

    Attributes:
        output: folder of the adapter.
        steps: taken in all.
        kept_step: after which the adapter was as it is published.
        skipped: steps whose loss or gradient was no number.
        resumed_from: step at which this process began; 0 if it began the run.
        trainable_parameters: in the adapter.
        samples: trained on.
        truncated: samples cut to the longest length.
        dropped: samples left out, as too long or since the cut took their whole answer.
        data: where samples came from, and what became of them.
        held_out_before: mean loss per answer token on the held-out samples, before training; None without any.
        held_out_after: the same of the published adapter; None if it was not measured.
        segments: that gradient checkpointing cuts the layers into; 0 if it is off.
        checkpointing: which layers are checkpointed, in words.
        compute_dtype: of activations and dequantized weights.
        memory: bytes that were predicted, by part (see ``networks.memory.Memory``) and in all, and ``measured``: by
            how much the process's memory grew, on a GPU what was allocated there; None where nobody tells.
        paging: the optimizer state's page table and what moved; see ``paging.Pages.metrics``.
        tokens_per_second: of this process.
        tensors_root: binds the adapter's tensors.
        manifest_sha256: of the adapter's manifest.
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
