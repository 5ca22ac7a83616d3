"""The first batch of a run as the model gets it: every token, which tokens carry loss, and where samples begin."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from adaptkit.data.batches import Batch
from adaptkit.data.encoding import IGNORED
from adaptkit.models.model_lock import model_lock
from adaptkit.training.config import TrainConfig
from adaptkit.training.inputs import read_inputs
from adaptkit.training.preparation import batches_of


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens that all carry loss, or all carry none.

    Attributes:
        learned: whether they carry loss.
        ids: token IDs.
        text: the decoded tokens.
    """

    learned: bool
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class ShownSample:
    """A sample in a batch.

    Attributes:
        source: file and line.
        row: row of the step, from 1; packed samples share a row.
        tokens: number of tokens.
        learned: number of tokens that carry loss.
        stretches: all tokens, in order.
    """

    source: str
    row: int
    tokens: int
    learned: int
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True)
class Preview:
    """The first step of a run.

    Attributes:
        micro_batches: number of micro-batches.
        rows: number of rows in all of them.
        padding: number of padding positions.
        samples: samples in row order.
        unused: maps each source that has unused columns to their names.
    """

    micro_batches: int
    rows: int
    padding: int
    samples: tuple[ShownSample, ...]
    unused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@model_lock()
def preview(config: TrainConfig) -> Preview:
    """Read a run's data and return its first batch, without writing anything or loading a model.

    Raises:
        CheckpointError, UsageError, DataError: base or data cannot be used.
    """
    inputs = read_inputs(config, None, False)
    batches = batches_of(inputs).micro_batches(0)
    samples: list[ShownSample] = []
    row = 0
    for batch in batches:
        samples += _samples(batch, inputs.tokenizer, row)
        row += len(batch.ids)
    padding = sum(int((batch.mask == 0).sum()) for batch in batches)
    unused = {source.name: source.unused for source in inputs.data.sources if source.unused}
    return Preview(len(batches), row, padding, tuple(samples), unused)


def _samples(batch: Batch, tokenizer: Any, before: int) -> Iterator[ShownSample]:
    """Yield the samples of a batch, reconstructed from the tensors that the model gets."""
    sources = iter(batch.sources)
    for row in range(len(batch.ids)):
        length = int(batch.mask[row].sum())
        ids, labels = batch.ids[row, :length].tolist(), batch.labels[row, :length].tolist()
        starts = [0] if batch.positions is None else (batch.positions[row, :length] == 0).nonzero().reshape(-1).tolist()
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            marked = [(label != IGNORED, token) for token, label in zip(ids[start:end], labels[start:end], strict=True)]
            yield ShownSample(
                source=next(sources),
                row=before + row + 1,
                tokens=end - start,
                learned=sum(learned for learned, _ in marked),
                stretches=tuple(
                    _stretch(learned, [token for _, token in group], tokenizer)
                    for learned, group in groupby(marked, key=lambda item: item[0])
                ),
            )


def _stretch(learned: bool, ids: list[int], tokenizer: Any) -> Stretch:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Stretch(learned, tuple(ids), str(text))
