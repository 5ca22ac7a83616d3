"""What a merge is asked for, and what it tells."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from adaptkit.arguments import typed_fields
from adaptkit.errors import UsageError
from adaptkit.operations._threads import check_threads

FORMATS = ("keep", "nf4")
LITTLE_KEPT = 0.9
"""Of the change: with less than that after rounding, the merged model is noticeably not the base with the adapter."""


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        weights: one per adapter; empty means 1 for each.
        undo: write the record that makes ``unmerge`` exact.
        allow_base_mismatch: merge onto a base that the adapter was not trained on; recorded in the manifest.
        untie: give the head a tensor of its own where a change would make it differ from the embedding.
        format: ``keep`` the base's types; or ``nf4``: quantize the merged weights, which are then never written in 16
            bits, and cannot be unmerged.
        embed_adapter: put copies of the adapters into the result, so that ``unmerge`` needs nothing else.
        threads: number of pieces merged at a time; one per processor if None. Not part of the result.
    """

    weights: tuple[float, ...] = ()
    undo: bool = True
    allow_base_mismatch: bool = False
    untie: bool = False
    format: str = "keep"
    embed_adapter: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        typed_fields(self)
        if self.format not in FORMATS:
            raise UsageError(f"format: must be one of {', '.join(FORMATS)}, found {self.format!r}")
        if self.format != "keep" and self.embed_adapter:
            raise UsageError(
                f"embed_adapter: a merge with format {self.format} cannot be unmerged", hint="leave out --embed-adapter"
            )
        if self.embed_adapter and not self.undo:
            raise UsageError(
                "embed_adapter: needs the undo record, as unmerge does", hint="leave out --no-undo or --embed-adapter"
            )
        check_threads(self.threads)


@dataclass(frozen=True)
class TensorChange:
    """What merging did to one tensor.

    Attributes:
        name: of the tensor.
        elements: number of them.
        moved: share of them whose value changed.
        delta_norm: ‖Δ‖, of the exact change.
        weight_norm: ‖W‖, of the base.
        effect: ⟨effect, Δ⟩ / ⟨Δ, Δ⟩, where effect is what the rounded addition, or the requantized weight, really
            changed; 1 where nothing is lost.
    """

    name: str
    elements: int
    moved: float
    delta_norm: float
    weight_norm: float
    effect: float


def change_of(name: str, elements: int, moved: float, sums: Sequence[float]) -> TensorChange:
    """Say what merging did to a tensor.

    Args:
        name: of it.
        elements: number of them.
        moved: how many of them.
        sums: Σ Δ², Σ W² and Σ effect · Δ.
    """
    squares, weights, overlap = sums
    effect = overlap / squares if squares else 1.0
    return TensorChange(name, elements, moved / max(1, elements), squares**0.5, weights**0.5, effect)


@dataclass(frozen=True)
class MergeReport:
    """What was done, or would be.

    Attributes:
        output: folder.
        base: folder that was merged onto.
        merged: number of tensors changed.
        added: names of tensors that the base does not have.
        tensors: in the result.
        base_verified: whether all changed weights were compared with those that every adapter was trained on; of a dry
            run, whether they will be.
        same_base: whether all of the base's tensors, and not just these, are those that every adapter was trained on;
            a dry run has not read them.
        told: what people should know: how names were found, what was untied, whose tokenizer it is.
        moved: share of the changed tensors' elements whose value moved.
        relative_delta: ‖Δ‖ / ‖W‖ over all changed tensors.
        effect: ⟨effect, Δ⟩ / ⟨Δ, Δ⟩ over all of them; what rounding left of the change.
        undo_bits: size of the undo record, in bits per element of the changed tensors; 0 without one. Like the three
            before it None for a dry run.
        changes: tensor by tensor, those of which least was left first.
        tensors_root: binds the result's tensors; None for a dry run.
        manifest_sha256: None for a dry run.
    """

    output: str
    base: str
    merged: int
    added: tuple[str, ...]
    tensors: int
    base_verified: bool
    same_base: bool
    told: tuple[str, ...] = ()
    moved: float | None = None
    relative_delta: float | None = None
    effect: float | None = None
    undo_bits: float | None = None
    changes: tuple[TensorChange, ...] = ()
    tensors_root: str | None = None
    manifest_sha256: str | None = None


def with_changes(report: MergeReport, changes: Sequence[TensorChange]) -> MergeReport:
    """A report that tells what was done to each tensor, and to all of them together."""
    elements = sum(change.elements for change in changes)
    squares = sum(change.delta_norm**2 for change in changes)
    weights = sum(change.weight_norm**2 for change in changes)
    overlap = sum(change.effect * change.delta_norm**2 for change in changes)
    return replace(
        report,
        moved=sum(change.moved * change.elements for change in changes) / max(1, elements),
        relative_delta=(squares / weights) ** 0.5 if weights else 0.0,
        effect=overlap / squares if squares else 1.0,
        changes=tuple(sorted(changes, key=lambda change: (change.effect, change.name))),
    )
