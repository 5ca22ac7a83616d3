"""Report on a run's data: where samples came from, which were cut or dropped, how full the batches are."""

import hashlib
from dataclasses import dataclass, fields
from typing import Any

from adaptkit.data.batches import Batches
from adaptkit.data.dataset import Dataset, SourceReport
from adaptkit.data.encoding import Sample
from adaptkit.training.inputs import Inputs


@dataclass(frozen=True)
class CutReport:
    """Counts of samples that are too long; the fields are those of ``Dataset``."""

    truncated: int
    dropped: int
    longest: int
    longest_at: str
    masked: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """Report on a run's data; fields that are not listed here are those of ``Dataset``.

    Attributes:
        sources: sources of ``data``; their counts include the rows that were held out.
        held_out_sources: sources of ``held_out_data``; empty without it.
        held_out_cut: samples of ``held_out_data`` that are too long; None without it.
        held_out_limited: whether only the most rows of the default are held out, and not a tenth.
        chat_template: file or adapter folder of the chat template; None if the template is the model's own.
        without_template: whether there are conversations but no chat template.
        unnamed_end: token that ends answers; None if the base's configuration names it.
        repeated: held-out samples that are also trained on.
        rows: rows in the first epoch; fewer than samples if they are packed.
        epoch_tokens: tokens of the first epoch, by source: all of its training tokens, or what a mixture draws.
    """

    sources: tuple[SourceReport, ...]
    held_out_sources: tuple[SourceReport, ...]
    held_out_cut: CutReport | None
    held_out_limited: bool
    longest: int
    longest_at: str
    masked: tuple[str, ...]
    split: int
    ended: int
    empty: int
    empty_at: str
    twice: int
    twice_at: str
    special: int
    special_at: str
    dated: bool
    chat_template: str | None
    without_template: bool
    unnamed_end: str | None
    repeated: int
    rows: int
    epoch_tokens: tuple[int, ...]


def report_data(inputs: Inputs, batches: Batches) -> DataReport:
    """Summarize a run's data."""
    data, known = inputs.data, {_key(sample) for sample in inputs.samples} if inputs.held_out else set()
    rows, tokens = 0, [0] * len(data.sources)
    for step in range(batches.steps_per_epoch):
        for row in batches.rows(step):
            rows += 1
            for sample in row:
                tokens[sample.origin] += len(sample.ids)
    tokenizer, end, other = inputs.tokenizer, inputs.unnamed_end, inputs.held_out_data
    return DataReport(
        **_shared(data, DataReport),
        held_out_sources=other.sources if other else (),
        held_out_cut=CutReport(**_shared(other, CutReport)) if other else None,
        held_out_limited=inputs.held_out_limited,
        chat_template=_template_from(inputs),
        without_template=data.has_conversations and tokenizer.chat_template is None,
        unnamed_end=None if end is None else str(tokenizer.convert_ids_to_tokens(end)),
        repeated=sum(_key(sample) in known for sample in inputs.held_out),
        rows=rows,
        epoch_tokens=tuple(tokens),
    )


def _shared(data: Dataset, kind: type[CutReport | DataReport]) -> dict[str, Any]:
    """Return the values of a report's fields that are those of ``Dataset``."""
    return {field.name: getattr(data, field.name) for field in fields(kind) if hasattr(data, field.name)}


def _template_from(inputs: Inputs) -> str | None:
    if inputs.chat_template is None:
        return None
    return inputs.config.chat_template or (str(inputs.start.root) if inputs.start else None)


def _key(sample: Sample) -> bytes:
    return hashlib.blake2b(sample.content(), digest_size=16).digest()  # hashed, since there may be millions of samples
