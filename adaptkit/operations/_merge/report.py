"""Options and report of ``merge``."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

NOTHING_MOVED = "no weight moved: the result is the base"
LITTLE_KEPT = 0.9
"""If rounding keeps less of the change than this, the merged model noticeably differs from base plus adapter."""


@dataclass(frozen=True)
class TensorChange:
    """Effect of merging on one tensor.

    Attributes:
        name: name of the tensor.
        elements: number of elements.
        moved: share of elements whose value changed.
        delta_norm: ‖Δ‖ of the exact change.
        weight_norm: ‖W‖ of the base's tensor.
        effect: ⟨E, Δ⟩ / ⟨Δ, Δ⟩, where E is the actual change after rounding or requantizing; 1 if nothing is lost,
            and more if the errors of W + Δ and W, which are quantized separately, differ in the direction of Δ.
        distance: ‖W - Q‖ of the original weight W and the quantized base's value Q; None unless both were found.
    """

    name: str
    elements: int
    moved: float
    delta_norm: float
    weight_norm: float
    effect: float
    distance: float | None = None


def change_of(name: str, elements: int, sums: Sequence[float]) -> TensorChange:
    """Return the effect of merging on a tensor from the sums over its elements; see ``EditedRows.sums``."""
    moved, squares, weights, overlap = sums
    effect = overlap / squares if squares else 1.0
    return TensorChange(name, elements, moved / max(1, elements), squares**0.5, weights**0.5, effect)


@dataclass(frozen=True)
class TextEffect:
    """How the result of a merge predicts a text, beside the given base plus the adapters, which are not rounded.

    Losses are in nats per token; divergences are means of KL(base + adapters ‖ X).

    Attributes:
        tokens: number of predicted tokens.
        base_loss, adapted_loss, merged_loss: of the base, of the base plus the adapters, and of the result.
        base_divergence, divergence: of the base alone, and of the result.
        other: of a quantized base, what else could have been merged into, see ``MergeOptions.onto``; empty if it was
            not found.
        other_loss, other_divergence: of a merge into that, in 16 bits.
    """

    tokens: int
    base_loss: float
    adapted_loss: float
    merged_loss: float
    base_divergence: float
    divergence: float
    other: str = ""
    other_loss: float | None = None
    other_divergence: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """Result of ``merge``; for a dry run, which reads no weights, what is found in them is None.

    Attributes:
        output, base: folders.
        onto: of a quantized base, what was merged into: ``original`` or ``trained``; empty if a plain base was given.
        merged: number of changed tensors.
        added: names of tensors that the base does not have.
        tensors: number of tensors in the result.
        base_verified: whether all changed weights are compared with those that every adapter was trained on.
        same_base: whether all of the base's tensors are those that every adapter was trained on; False for a dry run.
        notes: adapters given several times, how names were found, what was untied, where the tokenizer comes
            from.
        moved: share of the changed tensors' elements whose value changed.
        relative_delta: ‖Δ‖ / ‖W‖ over all changed tensors.
        effect: share of the change left after rounding, over all changed tensors; see ``TensorChange``.
        outputs_effect: with calibration, the same share of the change of the linears' outputs on its text.
        quantization_error: ‖W - Q‖ / ‖Δ‖ over the changed tensors for which ``TensorChange.distance`` is known. Far
            above 1, it matters more than the adapter whether W or Q is merged into.
        text: how the merge does on the text that was given to compare; None without.
        undo_bits: size of the undo record in bits per element of the changed tensors; 0 if there is none.
        changes: each changed tensor, smallest ``effect`` first.
        tensors_root, manifest_sha256: of the result.
    """

    output: str
    base: str
    onto: str
    merged: int
    added: tuple[str, ...]
    tensors: int
    base_verified: bool
    same_base: bool
    notes: tuple[str, ...] = ()
    moved: float | None = None
    relative_delta: float | None = None
    effect: float | None = None
    outputs_effect: float | None = None
    quantization_error: float | None = None
    text: TextEffect | None = None
    undo_bits: float | None = None
    changes: tuple[TensorChange, ...] = field(default=(), repr=False)
    tensors_root: str | None = None
    manifest_sha256: str | None = None


def with_changes(report: MergeReport, changes: Sequence[TensorChange]) -> MergeReport:
    """Return the report with the effect on each changed tensor, and on all of them together."""
    elements = sum(change.elements for change in changes)
    squares = sum(change.delta_norm**2 for change in changes)
    weights = sum(change.weight_norm**2 for change in changes)
    overlap = sum(change.effect * change.delta_norm**2 for change in changes)
    return replace(
        report,
        moved=sum(change.moved * change.elements for change in changes) / max(1, elements),
        relative_delta=(squares / weights) ** 0.5 if weights else 0.0,
        effect=overlap / squares if squares else 1.0,
        quantization_error=_relative_distance(changes),
        changes=tuple(sorted(changes, key=lambda change: (change.effect, change.name))),
    )


def _relative_distance(changes: Sequence[TensorChange]) -> float | None:
    known = [(change.distance, change.delta_norm) for change in changes if change.distance is not None]
    deltas = sum(delta**2 for _, delta in known)
    return (sum(distance**2 for distance, _ in known) / deltas) ** 0.5 if deltas else None
