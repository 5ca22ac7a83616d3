"""Questions in data files, each with all of its reference answers, and few-shot examples to put before them.

A question is a row's conversation up to its last answer; rows that ask the same become one question with several
references. Examples are whole conversations that precede it as turns of the same chat.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from adaptkit.data.conversation import Example, read_example
from adaptkit.data.dataset import Dataset, load_data
from adaptkit.data.encoding import Encoder, Sample, conversation_ids
from adaptkit.data.limits import check_vocabulary
from adaptkit.data.messages import Message, without_reasoning
from adaptkit.data.rows import read_rows
from adaptkit.data.sampling import order
from adaptkit.data.tool_calls import CALLS, Tools
from adaptkit.errors import DataError
from adaptkit.wording import counted

Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Question:
    """A conversation up to where the model answers.

    Attributes:
        messages: messages; the last is not the assistant's.
        tools: tools that the model may call.
        references: correct answers, without reasoning and duplicates, in file order; at least one.
    """

    messages: Messages
    references: tuple[str, ...]
    tools: Tools = ()


def read_questions(files: Sequence[Path], layout: str | None = None, *, to_score: bool = True) -> tuple[Question, ...]:
    """Group the rows of data files by what they ask, in the order of first appearance.

    Args:
        files: files of rows.
        layout: layout of the rows; None to detect it for each.
        to_score: whether answers will be scored, not only their loss measured; refuses empty references and tool calls.

    Raises:
        DataError: an unreadable file, a row without question or answer (with file and line), or no rows.
    """
    asked: dict[str, tuple[Messages, Tools]] = {}
    references: dict[str, dict[str, None]] = {}
    for where, example in _conversations(files, layout):
        *before, answer = example.messages
        if not before:
            raise DataError(f"{where}: an answer without a question", hint="put a user message before it")
        if to_score and CALLS in answer:
            raise DataError(f"{where}: the answer calls a tool, which cannot be scored", hint="leave out --generate")
        said = without_reasoning(answer["content"])
        if to_score and not said.strip():
            raise DataError(f"{where}: the answer is empty", hint="give every row a reference answer")
        key = json.dumps([before, example.tools], sort_keys=True)
        asked.setdefault(key, (tuple(before), example.tools))
        references.setdefault(key, {})[said] = None
    if not asked:
        raise DataError(f"{', '.join(map(str, files))}: no rows", hint="give a file with rows")
    return tuple(Question(messages, tuple(references[key]), tools) for key, (messages, tools) in asked.items())


def choose(questions: Sequence[Question], count: int | None, seed: int) -> tuple[Question, ...]:
    """Choose ``count`` questions by the seed, in file order; all if it is None."""
    if count is None or count >= len(questions):
        return tuple(questions)
    return tuple(questions[number] for number in sorted(order(len(questions), seed)[:count]))


def read_shots(
    files: Sequence[Path], count: int, seed: int, questions: Sequence[Question], layout: str | None = None
) -> tuple[Messages, ...]:
    """Choose examples by the seed, none of which reveals an answer to one of the questions.

    An example does so if it or its beginning asks the same as a question, or if it asks the same as a question's
    beginning: answers within a question are measured, too. System messages are not compared, because examples come
    without them.

    Raises:
        DataError: an unreadable file or row, or fewer examples than asked for.
    """
    asked = [_beginnings(question.messages) for question in questions]
    wholes, beginnings = {keys[-1] for keys in asked if keys}, {key for keys in asked for key in keys}
    found: dict[str, Messages] = {}
    for where, example in _conversations(files, layout):
        if example.tools or any(CALLS in message for message in example.messages):
            raise DataError(
                f"{where}: has tools, which examples cannot have", hint="use rows without tools in --shots-from"
            )
        turns = tuple(message for message in example.messages if message["role"] != "system")
        keys = _beginnings(turns[:-1])
        if not keys:
            raise DataError(f"{where}: an answer without a question", hint="put a user message before it")
        if keys[-1] not in beginnings and wholes.isdisjoint(keys):
            found.setdefault(keys[-1], turns)
    if len(found) < count:
        raise DataError(
            f"{', '.join(map(str, files))}: expected {counted(count, 'example')} apart from the questions, "
            f"found {counted(len(found), 'row')}",
            hint="lower --shots, or add --shots-from files",
        )
    conversations = list(found.values())
    return tuple(conversations[number] for number in order(len(conversations), seed)[:count])


def _beginnings(messages: Sequence[Message]) -> list[str]:
    """Return a key for each beginning of a conversation, ignoring system messages; the last is for all of it."""
    said, keys = hashlib.sha256(), []
    for message in messages:
        if message["role"] != "system":
            said.update(json.dumps(message, sort_keys=True).encode())
            keys.append(said.hexdigest())
    return keys


def with_shots(messages: Sequence[Message], shots: Sequence[Messages]) -> list[Message]:
    """Put examples before a conversation, after its system message if it begins with one."""
    begins = 1 if messages and messages[0]["role"] == "system" else 0
    return [*messages[:begins], *(turn for shot in shots for turn in shot), *messages[begins:]]


def prompt_with_shots(
    messages: Sequence[Message],
    shots: Sequence[Messages],
    tokenizer: Any,
    longest: int | None,
    tools: Tools = (),
) -> tuple[list[int], int]:
    """Tokenize a question after all examples that fit; the first examples are left out first.

    Args:
        messages: messages of the question.
        shots: examples.
        tokenizer: tokenizer of the model.
        longest: maximum number of tokens; None for no limit.
        tools: tools that the model may call.

    Returns:
        The tokens, more than ``longest`` if the question by itself is too long, and the number of examples in them.
    """
    for left_out in range(len(shots) + 1):
        ids = conversation_ids(with_shots(messages, shots[left_out:]), tokenizer, tools)
        if longest is None or len(ids) <= longest:
            break
    return ids, len(shots) - left_out


def load_data_with_shots(
    files: Sequence[Path],
    tokenizer: Any,
    shots: Sequence[Messages],
    max_length: int,
    longest: int | None,
    *,
    layout: str | None = None,
    known: int | None = None,
) -> tuple[Dataset, int]:
    """Tokenize rows after examples; only the row's own answers carry loss.

    Args:
        files: files of rows.
        tokenizer: tokenizer of the model.
        shots: examples before each row.
        max_length: maximum tokens of a row without its examples; longer ones are cut at the end.
        longest: maximum tokens with examples, the first of which are left out if necessary; None for no limit.
        layout: layout of the rows; None to detect it for each.
        known: vocabulary size of the model; None for no limit.

    Returns:
        The samples, with reports on the sources that count samples before any cut; and the number of rows without room
        for all examples.
    """
    conversations = list(_conversations(files, layout))
    plain = load_data(files, tokenizer, sys.maxsize, layout=layout)
    # A file of one row that is given twice has two adjacent rows of the same name, but of different origins.
    rows = [list(found) for _, found in groupby(plain.samples, lambda sample: (sample.origin, sample.source))]
    encoder = Encoder(tokenizer)
    samples, truncated, dropped, fewer = [], 0, 0, 0
    for (where, example), without_shots in zip(conversations, rows, strict=True):
        for left_out in range(len(shots) + 1):
            whole = _encode(encoder, example, shots[left_out:], where)
            if longest is None or all(len(sample.ids) <= longest for sample in whole):
                break
        fewer += left_out > 0
        for shorter, sample in zip(without_shots, whole, strict=True):
            excess = max(0, len(shorter.ids) - max_length)
            length = len(sample.ids) - excess
            cut = Sample(sample.ids[:length], sample.labels[:length], where)
            if cut.answer_tokens:
                check_vocabulary(cut.ids, known, where)
                samples.append(cut)
                truncated += excess > 0
            else:
                dropped += 1
    if not samples:
        raise DataError(
            f"{', '.join(map(str, files))}: no row has an answer within max_length {max_length}",
            hint="raise --max-length",
        )
    return replace(plain, samples=samples, truncated=truncated, dropped=dropped), fewer


def _encode(encoder: Encoder, example: Example, shots: Sequence[Messages], where: str) -> tuple[Sample, ...]:
    """Return the samples of a conversation after examples, which carry no loss."""
    before = sum(len(shot) for shot in shots)
    messages = tuple(with_shots(example.messages, shots))
    learned = tuple(turn + before for turn in example.learned)
    (encoded,) = encoder.encode([(where, replace(example, messages=messages, learned=learned))])
    return encoded.samples


def _conversations(files: Sequence[Path], layout: str | None) -> Iterator[tuple[str, Example]]:
    """Yield the place and conversation of each row, up to the last answer that carries loss."""
    for where, row in chain.from_iterable(map(read_rows, files)):
        example = read_example(row, where, layout)
        if example.text is not None:
            raise DataError(
                f"{where}: plain text has no question", hint="use conversations, or give the file with --text"
            )
        yield where, replace(example, messages=example.messages[: example.learned[-1] + 1])
