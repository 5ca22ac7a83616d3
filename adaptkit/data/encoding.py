"""Encoding of examples as samples: render the conversation, tokenize, and label the tokens that carry loss.

The text is tokenized in pieces that begin where answers begin (see ``answers``), because at inference the prompt is
tokenized by itself: in one piece, a line end that ends the prompt and one that begins the answer may become one token,
which no prompt ends with.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np

from adaptkit.data.answers import (
    AnswerSpan,
    answer_as_asked,
    check_answers,
    check_questions,
    check_turn,
    find_answer,
    shared,
)
from adaptkit.data.conversation import Example
from adaptkit.data.ending import Turns
from adaptkit.data.messages import Message
from adaptkit.data.rendering import render
from adaptkit.data.tokenizer_files import leading_special_tokens, tokens_in
from adaptkit.data.tool_calls import CALLS, Tools
from adaptkit.data.values import is_text
from adaptkit.errors import DataError, UsageError

IGNORED = -100
"""The label of a token that carries no loss."""

_Tokens = tuple[list[int], list[tuple[int, int]]]
"""Token IDs, and the start and end of each in the text."""


@dataclass(frozen=True)
class Sample:
    """One conversation or text.

    Attributes:
        ids: token IDs.
        labels: the same IDs, or ``IGNORED`` where there is no loss.
        source: file and line, or name and row; unique to a row of the data.
        origin: index of the source.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    source: str = ""
    origin: int = 0

    def content(self) -> bytes:
        """Return IDs and labels as bytes, without the source: equal for samples that teach the same."""
        return array("i", self.ids).tobytes() + array("i", self.labels).tobytes()

    @property
    def answer_tokens(self) -> int:
        """Number of tokens that carry loss; the first token never does."""
        return int(np.count_nonzero(np.asarray(self.labels[1:]) != IGNORED))


@dataclass(frozen=True)
class Rendered:
    """The text of a sample, before tokenization.

    Attributes:
        text: the whole text.
        answers: places of the answers in it, ascending.
        learned: whether all of it carries loss, as in plain text, and not only the answers.
        begins: whether to put the tokenizer's first token before it; chat templates write their own.
        ends: whether the model learns to stop at its end.
    """

    text: str
    answers: tuple[AnswerSpan, ...]
    learned: bool
    begins: bool
    ends: bool


@dataclass(frozen=True)
class Encoded:
    """The samples of an example.

    Attributes:
        samples: one, or one for each answer if the template rewrites earlier turns as a conversation continues.
        ended: number of samples given an end token, because the template puts none after an answer.
    """

    samples: tuple[Sample, ...]
    ended: int


class Encoder:
    """Encodes examples for one model.

    Args:
        tokenizer: a fast tokenizer of transformers; without a chat template, each message is put on its own lines,
            with an end token after each answer.
        loss_on: ``answers``, ``last_answer`` of each conversation, or ``all`` tokens. Plain text is learned whole.

    Raises:
        UsageError: the tokenizer is not fast, so it cannot map tokens to places in the text.
    """

    def __init__(self, tokenizer: Any, loss_on: str = "answers") -> None:
        if not tokenizer.is_fast:
            raise UsageError(f"{type(tokenizer).__name__} is not a fast tokenizer", hint="add its tokenizer.json")
        self._tokenizer, self._loss_on = tokenizer, loss_on
        self._ends = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
        self._turns = Turns(tokenizer)
        self._begin = array("i", leading_special_tokens(tokenizer))
        self._cuts = _joins(tokenizer)

    def encode(self, examples: Sequence[tuple[str, Example]]) -> Iterator[Encoded]:
        """Render examples, and tokenize them in one call, at which fast tokenizers are efficient.

        Args:
            examples: examples, each with its place in the data.

        Raises:
            DataError: the template refuses a conversation, or rewrites it so that answers cannot be located; or the
                tokenizer has no end token. Names the place.
        """
        texts: list[list[Rendered]] = []
        for where, example in examples:
            try:
                texts.append(self.rendered(example))
            except DataError as error:
                raise DataError(f"{where}: {error.message}", error.hint) from error
        tokens = self._tokenize([piece for group in texts for text in group for piece in self._pieces(text)])
        for (where, _), group in zip(examples, texts, strict=True):
            made = [self._sample(text, [next(tokens) for _ in self._pieces(text)], where) for text in group]
            yield Encoded(tuple(sample for sample, _ in made), sum(ended for _, ended in made))

    def learned(self, example: Example) -> tuple[int, ...]:
        """Return the indices of the messages that carry loss."""
        return example.learned[-1:] if self._loss_on == "last_answer" else example.learned

    def read(self, example: Example) -> Sequence[Message]:
        """Return the messages up to the last one that carries loss: what follows it teaches nothing."""
        return example.messages if self._loss_on == "all" else example.messages[: self.learned(example)[-1] + 1]

    def rendered(self, example: Example) -> list[Rendered]:
        """Return the texts of an example, with the places of the answers: one, or one for each answer.

        Raises:
            DataError: see ``encode``; does not name the place.
        """
        if example.text is not None:
            return [Rendered(example.text, (), True, True, True)]
        messages, learned, tools = self.read(example), self.learned(example), example.tools
        is_all, plain = self._loss_on == "all", self._tokenizer.chat_template is None
        whole = render(messages, self._tokenizer, tools)
        found: list[tuple[AnswerSpan | None, str, str]] = []
        for turn in (turn for turn, message in enumerate(messages) if turn in learned or CALLS in message):
            before = render(messages[:turn], self._tokenizer, tools, opening=True)
            is_last = turn + 1 == len(messages)
            through = whole if is_last else render(messages[: turn + 1], self._tokenizer, tools)
            if turn not in learned:  # a template that leaves out a part of the call changes the prompts after it
                check_turn(messages, turn, through[shared(before, through) :])
                continue
            ending = self._turns.ending(messages[turn], through, tools)
            answer = find_answer(messages, turn, before, through, ending)
            self._turns.check_opening(messages[turn], tools, before, through, answer)
            found.append((answer, through, before))
        answers = [a for a, through, _ in found if a is not None and whole.startswith(through[: a.end])]
        if len(answers) == len(found) or is_all:
            check_questions(messages, tools, whole)
        if is_all:
            check_answers(messages, whole)
        if len(answers) == len(found):
            is_last = learned[-1] == len(messages) - 1
            text = self._ended(whole, answers[-1]) if is_last else whole
            return [Rendered(text, tuple(self._closed(whole, a) for a in answers), is_all, plain, is_last)]
        if is_all:
            return [Rendered(whole, (), True, plain, False)]
        texts = []
        for turn, (answer, text, before) in zip(learned, found, strict=True):
            check_questions(messages[:turn], tools, before)
            if answer is None:
                text, answer = self._as_asked(messages, tools, turn, before)
                self._turns.check_opening(messages[turn], tools, before, text, answer)
            texts.append(Rendered(self._ended(text, answer), (answer,), False, plain, True))
        return texts

    def _as_asked(self, messages: Sequence[Message], tools: Tools, turn: int, before: str) -> tuple[str, AnswerSpan]:
        """Return text and place of an answer whose prompt the template changes once the answer follows."""
        alone = _with_question(messages, turn)
        asked = render(alone[:-1], self._tokenizer, tools, opening=True)
        answered = render(alone, self._tokenizer, tools)
        ending = self._turns.ending(messages[turn], answered, tools)
        return answer_as_asked(messages, turn, before, asked, answered, ending)

    def _ended(self, text: str, answer: AnswerSpan) -> str:
        """Cut off what the template puts after the last answer, unless it has an end token, since one replaces it.

        It is cut before tokenization, where one token may span the answer's end.
        """
        return text if self._turns.has_end(text[answer.words : answer.end]) else text[: answer.said]

    def _closed(self, text: str, answer: AnswerSpan) -> AnswerSpan:
        """Extend an answer by an end token that the template adds only before the next message, as Apertus's does."""
        end = self._tokenizer.eos_token
        if end and text.startswith(end, answer.end) and not self._turns.has_end(text[answer.words : answer.end]):
            return replace(answer, end=answer.end + len(end))
        return answer

    def _pieces(self, text: Rendered) -> list[str]:
        edges = [0, *(answer.start for answer in text.answers if self._cuts), len(text.text)]
        return [text.text[start:end] for start, end in pairwise(edges)]

    def _tokenize(self, pieces: list[str]) -> Iterator[_Tokens]:
        wanted = {"return_offsets_mapping": True, "return_attention_mask": False, "return_token_type_ids": False}
        encoded = self._tokenizer(pieces, add_special_tokens=False, verbose=False, **wanted)
        return zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)

    def _sample(self, text: Rendered, pieces: list[_Tokens], where: str) -> tuple[Sample, bool]:
        """Return a sample, and whether an end token was added after its answer."""
        ids, spans, closed = array("i"), [], False
        for number, (tokens, places) in enumerate(pieces):
            base = text.answers[number - 1].start if number else 0
            for answer in text.answers if not self._cuts else text.answers[number - 1 : number] if number else ():
                start = bisect_right(places, answer.start - base, key=itemgetter(1))  # may include the space before it
                end, closed = self._end(tokens, places, answer, base)
                spans.append(slice(len(ids) + start, len(ids) + end))
            ids.extend(tokens)
        labels = ids[:] if text.learned else array("i", [IGNORED]) * len(ids)
        for span in spans:
            labels[span] = ids[span]
        added = text.ends and not closed
        if added:
            eos = self._tokenizer.eos_token_id
            if eos is None:
                raise DataError(f"{where}: the tokenizer has no end token", hint="give it an eos_token")
            last = spans[-1].stop if spans else len(ids)
            added = labels[last - 1 : last] != array("i", [eos])  # the data may contain it already
            ids[last:] = labels[last:] = array("i", [eos] * added)
        if text.begins and ids[: len(self._begin)] != self._begin:
            ids, labels = self._begin + ids, array("i", [IGNORED]) * len(self._begin) + labels
        return Sample(ids, labels, where), added and bool(spans)

    def _end(self, tokens: list[int], places: list[tuple[int, int]], answer: AnswerSpan, base: int) -> tuple[int, bool]:
        """Return the end of an answer's tokens (exclusive), and whether the last of them ends the turn.

        What the template puts after the end of the turn is not learned.
        """
        last = bisect_right(places, answer.end - base, key=itemgetter(1))
        for index in range(last - 1, -1, -1):
            if places[index][0] + base < answer.words:
                break
            if tokens[index] in self._ends:
                return index + 1, True
        return bisect_left(places, answer.said - base, key=itemgetter(0)), False


def _with_question(messages: Sequence[Message], turn: int) -> list[Message]:
    """Return an answer with only the messages that it answers.

    These are the message before it or, if a tool gave that, all messages from the user's question on, with tool calls
    reduced to the calls: a template may leave out reasoning and text beside calls once an answer follows.
    """
    start = turn - 1
    while start > 0 and messages[start]["role"] == "tool":
        start = next((place for place in range(start, -1, -1) if messages[place]["role"] == "user"), 0)
    calls = [
        {"role": "assistant", "content": "", CALLS: message[CALLS]} if CALLS in message else message
        for message in messages[start:turn]
    ]
    return [*calls, messages[turn]]


def as_message(prompt: str) -> Message:
    """Return a prompt as a user message; raise UsageError if it is not UTF-8."""
    if not is_text(prompt):
        raise UsageError(f"the prompt {prompt!r} is not UTF-8")
    return {"role": "user", "content": prompt}


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a prompt, up to where the model answers; see ``as_message``."""
    return conversation_ids([as_message(prompt)], tokenizer)


def conversation_ids(messages: Sequence[Message], tokenizer: Any, tools: Tools = ()) -> list[int]:
    """Return the tokens of a conversation, up to where the model answers."""
    ids = tokens_in(render(messages, tokenizer, tools, opening=True), tokenizer)
    return ids if tokenizer.chat_template is not None else [*leading_special_tokens(tokenizer), *ids]


def _joins(tokenizer: Any) -> bool:
    """Whether text tokenized in pieces decodes to the same text; some tokenizers put a space before each piece."""
    pieces = tokenizer(["a", "b"], add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode([*pieces[0], *pieces[1]]) == "ab")
