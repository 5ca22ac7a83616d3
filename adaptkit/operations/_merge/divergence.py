"""How a merge predicts a text, beside the base plus the adapters, both run layer by layer in float32."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from adaptkit.checkpoint.decoded import DecodedCheckpoint
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.quantization import quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.formats._format import writable
from adaptkit.models.model_lock import model_lock
from adaptkit.operations._calibrate.replay import Replay
from adaptkit.operations._calibrate.text import read_calibration
from adaptkit.operations._merge.edit_plan import plan_edits
from adaptkit.operations._merge.merging import Merging
from adaptkit.operations._merge.report import TextEffect
from adaptkit.operations._merge.view import MergedView
from adaptkit.operations._roles import stores_transposed
from adaptkit.operations._threads import thread_count
from adaptkit.operations.options import Calibration

_POSITIONS = 128
"""Number of predictions whose logits are in memory at a time."""


@dataclass(frozen=True)
class MergeComparison:
    """What a merge is compared with, found before it is written.

    Attributes:
        tokens: (windows, window) int64; each token but a window's first is predicted.
        given: the base as it was given, decoded if it is quantized.
        adapted: that plus the adapters, in float32.
        onto: of a quantized base's original and own values, the one that is not merged into; empty if unknown.
        other: that merged, in 16 bits.
    """

    tokens: Tensor
    given: Checkpoint
    adapted: Checkpoint
    onto: str = ""
    other: Checkpoint | None = None


def plan_comparison(merging: Merging) -> MergeComparison:
    """Read the text, and plan what is compared.

    Raises:
        DataError: a file cannot be read.
        UsageError: there is no tokenizer, or a model to run would have its weights in another order.
    """
    base, options = merging.base, merging.options
    threads, given, edits = thread_count(options.threads), base.checkpoint, merging.edits
    may_turn = options.format in writable() or base.quantized is not None
    if may_turn and any(stores_transposed(given, name) for name in edits.of):
        raise UsageError("text: GPT-2's layers cannot be run quantized", hint="leave out --text")
    tokens = read_calibration(given.root, Calibration(files=options.text))
    onto, other = "", None
    if base.other is not None:
        onto = "original" if base.decoded else "trained"
        with contextlib.suppress(BaseMismatchError, UsageError):  # adapters that fit only the base's own values
            others = plan_edits(
                base.other, merging.adapters, merging.weights, options.untie, is_trained_on=base.decoded is None
            )
            other = MergedView(base.other, others, {}, threads)
            if base.decoded is None:
                given, edits = base.other, others
    adapted = MergedView(given, edits, {}, threads, exact=True)
    return MergeComparison(tokens, given, adapted, onto if other else "", other)


@model_lock()
def text_effect(comparison: MergeComparison, output: Path, progress: Progress) -> TextEffect:
    """Compare the result of a merge on a text with the base plus the adapters.

    Args:
        comparison: what to compare with.
        output: the result.
        progress: called with steps done, each one batch through one layer.

    Raises:
        UsageError: transformers cannot run the model, or a token is not in its vocabulary.
    """
    tokens, other = comparison.tokens, comparison.other
    models = [comparison.adapted, comparison.given, _decoded(Checkpoint(output)), *([other] if other else [])]
    runs = []
    for number, model in enumerate(models):
        replay = Replay(model, tokens)
        steps = len(replay.prefixes) * len(replay.batches)
        runs.append((replay, _through_layers(replay, number * steps, len(models) * steps, progress)))
    adapted, *others = runs
    (adapted_loss, base_loss, base_divergence), *found = [_compared(adapted, run) for run in others]
    return TextEffect(
        tokens.shape[0] * (tokens.shape[1] - 1),
        base_loss,
        adapted_loss,
        found[0][1],
        base_divergence,
        found[0][2],
        comparison.onto,
        found[1][1] if found[1:] else None,
        found[1][2] if found[1:] else None,
    )


def _decoded(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint if quantization_found(checkpoint) is None else DecodedCheckpoint(checkpoint)


def _through_layers(replay: Replay, done: int, total: int, progress: Progress) -> list[Any]:
    """Return the last layer's output for each batch, given the steps done before, and those of all models."""
    outputs: list[Any] = [None] * len(replay.batches)
    with replay.outside(), torch.no_grad():
        for index in range(len(replay.prefixes)):
            with replay.layer(index):
                for batch, before in enumerate(outputs):
                    outputs[batch] = replay.run(index, batch, before)
                    progress(done + index * len(outputs) + batch + 1, total)
    return outputs


def _compared(one: tuple[Replay, list[Any]], other: tuple[Replay, list[Any]]) -> tuple[float, float, float]:
    """Return the losses of two models, and the mean of KL(one ‖ other)."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    with one[0].outside(), one[0].head(), other[0].outside(), other[0].head(), torch.no_grad():
        for batch, positions in _parts(one[0].batches):
            labels = one[0].batches[batch][:, positions + 1].reshape(-1)
            first, second = (
                log_softmax(replay.finish(batch, outputs[batch], positions).double(), -1).flatten(0, 1)
                for replay, outputs in (one, other)
            )
            losses = [cross_entropy(logits, labels, reduction="sum") for logits in (first, second)]
            sums += torch.stack([*losses, kl_div(second, first, reduction="sum", log_target=True)])
            count += len(labels)
    first_loss, second_loss, divergence = (sums / count).tolist()
    return first_loss, second_loss, divergence


def _parts(batches: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield batches with some of the positions at which the next token is predicted."""
    for batch, tokens in enumerate(batches):
        step = max(1, _POSITIONS // len(tokens))
        for start in range(0, tokens.shape[1] - 1, step):
            yield batch, torch.arange(start, min(start + step, tokens.shape[1] - 1))
