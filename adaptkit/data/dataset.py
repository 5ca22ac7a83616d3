"""Training data: rows become samples; what was cut, dropped or not used is counted and named."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.data.conversation import Example, check_not_excluded, read_example
from adaptkit.data.encoding import Encoder, Sample
from adaptkit.data.ending import ends_after_answers
from adaptkit.data.limits import check_vocabulary
from adaptkit.data.messages import REASONING
from adaptkit.data.rendering import asks_for_the_date
from adaptkit.data.rows import is_on_hub, read_rows
from adaptkit.data.tokenizer_files import special_tokens
from adaptkit.data.tool_calls import CALLS, words_of, words_of_tools
from adaptkit.errors import DataError
from adaptkit.wording import counted

_TOGETHER = 1000
"""Number of rows tokenized at a time."""
_NAMED = 5
"""Maximum number of rows that a report names."""


@dataclass(frozen=True)
class SourceReport:
    """Samples of one source.

    Attributes:
        name: file, or name on the Hub.
        sha256: hash of the file, or of the rows of a Hub dataset.
        rows: number of rows.
        samples: number of samples that can be trained on.
        tokens: number of tokens in these samples.
        answer_tokens: number of these tokens that carry loss.
        layouts: maps each layout to its number of rows.
        unused: columns that no layout has, and other parts of the rows that are not read.
    """

    name: str
    sha256: str
    rows: int
    samples: int
    tokens: int
    answer_tokens: int
    layouts: Mapping[str, int]
    unused: tuple[str, ...]


@dataclass
class Dataset:
    """Samples, and counts of what was cut or dropped; filled row by row.

    Attributes:
        samples: samples in the order of their rows.
        truncated: number of samples cut to the maximum length.
        dropped: number of samples left out: too long, or cut before any token with loss.
        sources: reports on the sources, in the order given.
        longest, longest_at: tokens of the longest sample before any was cut, and its place.
        masked: places of the first few samples left out because the cut removed all tokens with loss.
        split: number of conversations with a sample for each answer, because the chat template rewrites earlier turns.
        ended: number of samples given an end token, because the chat template puts none after an answer.
        empty, empty_at: number of rows with an empty answer that carries loss, and the place of the first.
        twice, twice_at: the same of rows with an answer that carries loss and ends with an end token, before that of
            the template.
        special, special_at: the same of rows with a special token in a message or tool, which a model cannot tell from
            the template's; the place also names the token.
        dated: whether the chat template asks for the date; it gets the same date every day.
    """

    samples: list[Sample] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    sources: tuple[SourceReport, ...] = ()
    longest: int = 0
    longest_at: str = ""
    masked: tuple[str, ...] = ()
    split: int = 0
    ended: int = 0
    empty: int = 0
    empty_at: str = ""
    twice: int = 0
    twice_at: str = ""
    special: int = 0
    special_at: str = ""
    dated: bool = False

    @property
    def has_conversations(self) -> bool:
        """Whether there are conversations, not only text."""
        return any(set(source.layouts) - {"text"} for source in self.sources)


def load_data(
    sources: Sequence[Path | str],
    tokenizer: Any,
    max_length: int,
    *,
    too_long: str = "cut",
    loss_on: str = "answers",
    layout: str | None = None,
    context: int | None = None,
    known: int | None = None,
) -> Dataset:
    """Read sources and tokenize their rows.

    Args:
        sources: files or Hub datasets, read in order; see ``data.rows``.
        tokenizer: tokenizer of the model.
        max_length: maximum tokens of a sample.
        too_long: what to do with longer samples: ``cut`` at the end, ``drop`` or ``error``.
        loss_on: see ``Encoder``.
        layout: layout of all rows; None to detect it for each.
        context: maximum sequence length of the model; None if unknown.
        known: vocabulary size of the model; None if unknown.

    Raises:
        UsageError: the tokenizer produces tokens outside of the model's vocabulary.
        DataError: an unreadable file, a row without the fields that it needs or too long for the model (with file and
            line), or nothing to learn.
    """
    reader = _RowReader(tokenizer, Encoder(tokenizer, loss_on), max_length, too_long, context, known)
    data = reader.data
    data.sources = tuple(reader.read(source, number, layout) for number, source in enumerate(sources))
    if not data.samples:
        dropped = counted(data.dropped, "sample")
        reason = f"no samples left; dropped {dropped} (too long, or answer cut off, at max_length {max_length})"
        hint = "raise --max-length" if data.dropped else "give a file with rows"
        raise DataError(f"{', '.join(map(str, sources))}: {reason if data.dropped else 'no rows'}", hint=hint)
    data.dated = asks_for_the_date(tokenizer) and data.has_conversations
    return data


class _RowReader:
    """Reads sources into ``data``: encodes rows, cuts or drops samples that are too long, and counts them."""

    def __init__(
        self, tokenizer: Any, encoder: Encoder, max_length: int, too_long: str, context: int | None, known: int | None
    ) -> None:
        self._encoder, self._max_length, self._too_long = encoder, max_length, too_long
        self._context, self._known = context, known
        self._ends, self._special = ends_after_answers(tokenizer), special_tokens(tokenizer)
        self.data = Dataset()

    def read(self, source: Path | str, number: int, layout: str | None) -> SourceReport:
        """Read the source of this number."""
        layouts: Counter[str] = Counter()
        used: set[str] = set()
        columns: dict[str, None] = {}
        digest = hashlib.sha256() if is_on_hub(source) else None
        before = len(self.data.samples)
        rows = read_rows(source)
        while True:
            examples = []
            for where, row in islice(rows, _TOGETHER):
                held = {name: value for name, value in row.items() if value is not None}
                if digest is not None:
                    digest.update(json.dumps(held, sort_keys=True, default=str).encode())
                check_not_excluded(row, where)
                example = read_example(row, where, layout)
                self._count_flaws(example, where)
                layouts[example.layout] += 1
                used.update(example.columns)
                columns |= dict.fromkeys((*held, *(f"{key} of messages" for key in sorted(example.ignored))))
                if example.messages and len(self._encoder.read(example)) < len(example.messages):
                    columns["messages after the last learned answer"] = None
                examples.append((where, example))
            if not examples:
                break
            for encoded in self._encoder.encode(examples):
                self.data.split += len(encoded.samples) > 1
                self.data.ended += encoded.ended
                for sample in encoded.samples:
                    self._add(replace(sample, origin=number))
        added = self.data.samples[before:]
        return SourceReport(
            name=str(source),
            sha256=digest.hexdigest() if digest is not None else file_sha256(Path(source)),
            rows=layouts.total(),
            samples=len(added),
            tokens=sum(len(sample.ids) for sample in added),
            answer_tokens=sum(sample.answer_tokens for sample in added),
            layouts=dict(layouts),
            unused=tuple(name for name in columns if name not in used),
        )

    def _count_flaws(self, example: Example, where: str) -> None:
        """Count a row that learns an empty answer, one that ends twice, or one with other special tokens."""
        learned, data = self._encoder.learned(example), self.data
        said = [example.messages[number] for number in learned]
        if any(not message["content"].strip() and CALLS not in message for message in said):
            data.empty, data.empty_at = data.empty + 1, data.empty_at or where
        if any(message["content"].rstrip().endswith(self._ends) for message in said):
            data.twice, data.twice_at = data.twice + 1, data.twice_at or where
        token = next(filter(None, map(self._special.search, self._words(example, learned))), None)
        if token is not None:
            data.special, data.special_at = data.special + 1, data.special_at or f"{where}: {token[0]}"

    def _words(self, example: Example, learned: Sequence[int]) -> Iterator[str]:
        """Yield the texts of a conversation that is learned, without the end tokens of answers."""
        for number, message in enumerate(self._encoder.read(example) if learned else ()):
            content = message["content"].rstrip()
            end = next((end for end in self._ends if number in learned and content.endswith(end)), "")
            yield from (message.get(REASONING, ""), content.removesuffix(end), *words_of(message.get(CALLS, ())))
        yield from words_of_tools(example.tools) if learned else ()

    def _add(self, sample: Sample) -> None:
        """Add a sample, cut if it is too long, or drop it."""
        length, data, most = len(sample.ids), self.data, self._max_length
        if sample.answer_tokens == 0:
            raise DataError(f"{sample.source}: nothing to learn", hint="give every row an answer, or text")
        if length > data.longest:
            data.longest, data.longest_at = length, sample.source
        if length > most:
            if self._too_long == "error":
                hint = "raise --max-length, or use --too-long cut or drop"
                raise DataError(f"{sample.source}: {length} tokens are more than max_length {most}", hint=hint)
            sample = replace(sample, ids=sample.ids[:most], labels=sample.labels[:most])
            if self._too_long == "drop" or sample.answer_tokens == 0:
                data.dropped += 1
                named = () if self._too_long == "drop" else (sample.source,)
                data.masked = (*data.masked, *named)[:_NAMED]
                return
            data.truncated += 1
        if self._context is not None and len(sample.ids) > self._context:
            raise DataError(
                f"{sample.source}: {len(sample.ids)} tokens are longer than the model's context of {self._context}",
                hint=f"use --max-length {self._context}",
            )
        check_vocabulary(sample.ids, self._known, sample.source)
        data.samples.append(sample)
