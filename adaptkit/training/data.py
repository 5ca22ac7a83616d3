"""Instruction data: rows to token ids, with a label only where the model shall answer.

The rows are those of ``checkpoint.conversation``, and go through the model's own chat template. What the template
adds between a conversation up to the answer's opening and the conversation with the answer is the answer, its
end-of-turn token included; only that carries loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from adaptkit.checkpoint.conversation import Message, is_text, messages_of, render, rows
from adaptkit.errors import DataError, UsageError

IGNORED = -100
"""The label of a token that carries no loss."""


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        ids: token ids.
        labels: the same, or ``IGNORED`` where there is no loss.
        source: file and line.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    source: str = ""

    @property
    def answer_tokens(self) -> int:
        """Number of tokens that carry loss; the first token never does."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Dataset:
    """Samples, and what happened on the way.

    Attributes:
        samples: in file order.
        truncated: how many were cut to the longest length.
        dropped: how many were left out since the cut took their whole answer.
    """

    samples: tuple[Sample, ...]
    truncated: int
    dropped: int


def load_data(files: Sequence[Path], tokenizer: Any, max_length: int) -> Dataset:
    """Read jsonl files and tokenize their rows.

    Args:
        files: one after the other.
        tokenizer: with a chat template; without one, prompt and answer follow each other on lines of their own.
        max_length: tokens; longer samples are cut at the end.

    Raises:
        DataError: an unreadable file, a row without the fields that it needs (with file and line), or nothing to learn.
    """
    samples, truncated, dropped = [], 0, 0
    for file in files:
        for where, row in rows(file):
            try:
                whole = encode(messages_of(row, where), tokenizer)
            except DataError as error:
                raise DataError(f"{where}: {error.message.removeprefix(f'{where}: ')}", error.hint) from error
            if whole.answer_tokens == 0:
                raise DataError(f"{where}: the answer is empty", hint="every row needs something to learn")
            cut = Sample(whole.ids[:max_length], whole.labels[:max_length], where)
            truncated += len(whole.ids) > max_length
            if cut.answer_tokens:
                samples.append(cut)
            else:
                dropped += 1
    if not samples:
        reason = f"all {dropped} rows lose their answer at {max_length} tokens" if dropped else "there are no rows"
        raise DataError(f"{', '.join(map(str, files))}: {reason}", hint="raise max_length, or give other data")
    return Dataset(tuple(samples), truncated, dropped)


def encode(messages: Sequence[Message], tokenizer: Any) -> Sample:
    """Tokenize a conversation once, and label the tokens inside the assistant's turns.

    Raises:
        DataError: the template refuses the conversation, or rewrites earlier turns, so that no turn has a fixed place.
    """
    text = render(messages, tokenizer)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            if turn == 0:
                raise DataError("the assistant speaks first", hint="begin with a user's message")
            before = render(messages[:turn], tokenizer, opening=True)
            through = render(messages[: turn + 1], tokenizer)
            if not (text.startswith(through) and through.startswith(before)):
                raise DataError(
                    f"the chat template rewrites the conversation around message {turn + 1}, so that its tokens cannot "
                    "be told from the others",
                    hint="split the conversation into rows of one answer each, or use another template",
                )
            spans.append((len(before), len(through)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = [int(token) for token in encoded["input_ids"]]
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        inside = [i for i, (left, right) in enumerate(encoded["offset_mapping"]) if left >= start and right <= end]
        ends = [i for i in inside if ids[i] == tokenizer.eos_token_id]
        for i in inside:
            if not ends or i <= ends[-1]:  # what the template puts after the end of the turn is not the model's to say
                labels[i] = ids[i]
    return Sample(tuple(ids), tuple(labels))


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """The tokens of a user's message, up to where the model answers.

    Raises:
        UsageError: the message is not UTF-8.
    """
    if not is_text(prompt):
        raise UsageError(f"the prompt {prompt!r} is not UTF-8")
    text = render([{"role": "user", "content": prompt}], tokenizer, opening=True)
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def split(samples: Sequence[Sample], held_out: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Set a fraction of the samples aside, chosen by the seed; at least one on each side unless it is zero.

    Returns:
        Samples to train on, and held-out ones.

    Raises:
        DataError: there are too few to split.
    """
    if held_out == 0:
        return list(samples), []
    if len(samples) < 2:
        raise DataError("one sample cannot be split", hint="give more data, or held_out: 0")
    count = min(len(samples) - 1, max(1, round(len(samples) * held_out)))
    chosen = set(order(len(samples), seed)[:count])
    return [s for i, s in enumerate(samples) if i not in chosen], [samples[i] for i in sorted(chosen)]


@lru_cache(maxsize=4)
def order(count: int, seed: int) -> tuple[int, ...]:
    """A permutation of range(count) that depends on the seed alone."""
    return tuple(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist())
