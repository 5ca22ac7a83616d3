"""What a run's data are, for its report: where samples came from, what became of them, how full the batches are."""

import hashlib
from dataclasses import dataclass

from adaptkit.training.data.batches import Batches
from adaptkit.training.data.dataset import Dataset, SourceReport
from adaptkit.training.data.samples import Sample
from adaptkit.training.inputs import Inputs


@dataclass(frozen=True)
class CutReport:
    """What became of samples that are too long, in the words of ``Dataset``."""

    truncated: int
    dropped: int
    longest: int
    longest_at: str
    masked: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """What a run's data are: what is not said here is as in ``Dataset``.

    Attributes:
        sources: of all samples, held-out ones among them.
        held_out_sources: of samples that are only measured.
        held_out_cut: what became of those of them that are too long; None where they have no sources of their own.
        chat_template: whose the conversations went through, if it is not the model's: a file or an adapter's folder.
        without_template: whether there are conversations, and no chat template.
        unnamed_end: the token that ends answers, if the base's configuration does not name it.
        repeated: held-out samples that are also trained on.
        rows: of an epoch; fewer than samples where they are packed.
        epoch_tokens: of an epoch, by source; all of its tokens, or what a mixture draws.
    """

    sources: tuple[SourceReport, ...]
    held_out_sources: tuple[SourceReport, ...]
    held_out_cut: CutReport | None
    longest: int
    longest_at: str
    masked: tuple[str, ...]
    split: int
    ended: int
    empty: int
    empty_at: str
    twice: int
    twice_at: str
    dated: bool
    chat_template: str | None
    without_template: bool
    unnamed_end: str | None
    repeated: int
    rows: int
    epoch_tokens: tuple[int, ...]


def report_data(inputs: Inputs, batches: Batches) -> DataReport:
    """Sum up a run's data."""
    data, known = inputs.data, {_key(sample) for sample in inputs.samples} if inputs.held_out else set()
    rows, tokens = 0, [0] * len(data.sources)
    for step in range(batches.steps_per_epoch):
        for row in batches.rows(step):
            rows += 1
            for sample in row:
                tokens[sample.origin] += len(sample.ids)
    tokenizer, end, other = inputs.tokenizer, inputs.unnamed_end, inputs.held_out_data
    return DataReport(
        sources=data.sources,
        held_out_sources=other.sources if other else (),
        held_out_cut=_cut(other) if other else None,
        longest=data.longest,
        longest_at=data.longest_at,
        masked=data.masked,
        split=data.split,
        ended=data.ended,
        empty=data.empty,
        empty_at=data.empty_at,
        twice=data.twice,
        twice_at=data.twice_at,
        dated=data.dated,
        chat_template=_template_from(inputs),
        without_template=data.talks and tokenizer.chat_template is None,
        unnamed_end=None if end is None else str(tokenizer.convert_ids_to_tokens(end)),
        repeated=sum(_key(sample) in known for sample in inputs.held_out),
        rows=rows,
        epoch_tokens=tuple(tokens),
    )


def _cut(data: Dataset) -> CutReport:
    return CutReport(data.truncated, data.dropped, data.longest, data.longest_at, data.masked)


def _template_from(inputs: Inputs) -> str | None:
    if inputs.chat_template is None:
        return None
    return inputs.config.chat_template or (str(inputs.start.root) if inputs.start else None)


def _key(sample: Sample) -> bytes:
    return hashlib.blake2b(sample.content(), digest_size=16).digest()  # millions of samples are not held twice
