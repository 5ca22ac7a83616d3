"""Instruction data: rows to token ids, with a label only where the model shall answer.

A jsonl row is one of
    {"instruction", "context" or "input" (optional), "output" or "response"}
    {"prompt", "completion"}
    {"messages": [{"role", "content"}, ...]}
and goes through the model's own chat template. What the template adds between a conversation up to the answer's
opening and the conversation with the answer is the answer, its end-of-turn token included; only that carries loss.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptkit.errors import DataError, UsageError

IGNORED = -100
"""The label of a token that carries no loss."""

_HALF = re.compile("[\ud800-\udfff]")

Message = dict[str, str]


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        ids: token ids.
        labels: the same, or ``IGNORED`` where there is no loss.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]

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


@dataclass(frozen=True)
class Batch:
    """Samples padded to one length.

    Attributes:
        ids: (batch, length) int64.
        labels: (batch, length) int64, ``IGNORED`` where there is no loss.
        mask: (batch, length) int64, 1 for tokens and 0 for padding.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor


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
        for where, row in _rows(file):
            try:
                whole = encode(_messages(row, where), tokenizer)
            except DataError as error:
                raise DataError(f"{where}: {error.message.removeprefix(f'{where}: ')}", error.hint) from error
            if whole.answer_tokens == 0:
                raise DataError(f"{where}: the answer is empty", hint="every row needs something to learn")
            cut = Sample(whole.ids[:max_length], whole.labels[:max_length])
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
    text = _render(messages, tokenizer)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            if turn == 0:
                raise DataError("the assistant speaks first", hint="begin with a user's message")
            before = _render(messages[:turn], tokenizer, opening=True)
            through = _render(messages[: turn + 1], tokenizer)
            if not (text.startswith(through) and through.startswith(before)):
                raise DataError(
                    f"the chat template rewrites the conversation around message {turn + 1}, so that its tokens cannot "
                    "be told from the others",
                    hint="split the conversation into rows of one answer each, or use another template",
                )
            spans.append((len(before), len(through)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
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
    if not _is_text(prompt):
        raise UsageError(f"the prompt {prompt!r} is not UTF-8")
    text = _render([{"role": "user", "content": prompt}], tokenizer, opening=True)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


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


def step_samples(samples: Sequence[Sample], batch_size: int, step: int, seed: int) -> list[Sample]:
    """The samples of the step-th batch (from 0): each epoch is a new permutation, and batches run across its end.

    A function of the step alone, so that a resumed run sees what an uninterrupted one would.
    """
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(position, len(samples))
        chosen.append(samples[order(len(samples), seed * 1_000_003 + epoch)[index]])
    return chosen


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pad samples at the end to the longest. The mask tells what is padding; its id may be the end token's."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), length), pad_id)
    labels = torch.full((len(samples), length), IGNORED)
    mask = torch.zeros((len(samples), length), dtype=torch.int64)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        labels[row, : len(sample.ids)] = torch.tensor(sample.labels)
        mask[row, : len(sample.ids)] = 1
    return Batch(ids, labels, mask)


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if file.suffix != ".jsonl":
        raise DataError(f"{file}: expected a .jsonl file", hint="one JSON object on each line")
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows editors begin files with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    lines = text.split("\n")  # splitlines would cut at characters that JSON strings may hold as they are
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, found {type(row).__name__}")
        yield where, row


def _messages(row: Mapping[str, Any], where: str) -> list[Message]:
    if "messages" in row:
        messages = row["messages"]
        roles = {"system", "user", "assistant"}
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and _is_text(m.get("role")) and m["role"] in roles and _is_text(m.get("content"))
            for m in messages
        ):
            raise DataError(f"{where}: messages must be a list of {{role, content}}", hint=f"roles: {sorted(roles)}")
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{where}: no message is the assistant's")
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    question = _text(row, ("instruction", "prompt"), where)
    answer = _text(row, ("output", "response", "completion"), where)
    context = next((row[name] for name in ("context", "input") if row.get(name)), "")
    if not _is_text(context):
        raise DataError(f"{where}: the context is no text", hint="context and input are strings, or left out")
    if context:
        question = f"{question}\n\n{context}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    for name in names:
        if _is_text(row.get(name)):
            return str(row[name])
    raise DataError(f"{where}: has no {' or '.join(names)}", hint=f"found: {', '.join(map(str, row)) or 'nothing'}")


def _is_text(value: Any) -> bool:
    """Whether this is a string that tokenizers take: JSON's escapes can write half a character."""
    return isinstance(value, str) and _HALF.search(value) is None


def _render(messages: Sequence[Message], tokenizer: Any, opening: bool = False) -> str:
    if not messages:
        return ""
    if tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise DataError("the tokenizer has neither a chat template nor an end token")
        ends = {"assistant": tokenizer.eos_token}
        return "".join(message["content"] + ends.get(message["role"], "\n") for message in messages)
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opening))
    except TemplateError as error:
        raise DataError(f"the chat template refuses the conversation ({error})") from error
