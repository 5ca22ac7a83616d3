"""Where the answers are in what a chat template makes of a conversation.

What the template adds between a conversation up to the answer's opening and the conversation with the answer is the
answer, its end of turn included. Some templates write what was asked in another way once the answer follows: they have
the model answer after ``<think>``, and leave thoughts out of answers that are there; or they put the system's message
before the last question, if nothing follows. Then what the model is asked comes first, as it is asked, and after it
what the template adds to that question by itself. No word of a message may be lost on the way.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from adaptkit.checkpoint.thoughts import Message, words_of
from adaptkit.errors import DataError

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HALF_TAG = re.compile(r"[<\[][^<>\[\]\s]*$")
_BETWEEN_LINES = re.compile(r"\s*\n\s*|</?think>")
"""What templates write in their own way within a message: marks of thoughts, and white space around lines."""
_HINT = "give the model another chat template"


@dataclass(frozen=True)
class Answer:
    """Where a turn of the assistant is in a text.

    Attributes:
        start: where its opening ends.
        said: where its content ends.
        end: where the turn ends: after the token that ends it, as far as the template's is known.
    """

    start: int
    said: int
    end: int


@dataclass(frozen=True)
class _Place:
    """Where a message's content is in a text.

    Attributes:
        start: of its first line.
        stop: of its last line; both are None if a line is missing.
        missing: the line.
    """

    start: int | None
    stop: int | None
    missing: str = ""


def find_answer(messages: Sequence[Message], turn: int, before: str, through: str, end: int) -> Answer | None:
    """Where an answer is in the text of a conversation up to its end.

    Args:
        messages: of the conversation.
        turn: of the answer.
        before: the text up to where the model is to answer.
        through: the text up to the answer's end, and what the template puts after it.
        end: of the turn, in it.

    Returns:
        None if the template rewrites what is before the answer, or leaves a part of it out.

    Raises:
        DataError: the assistant speaks first.
    """
    if turn == 0:
        raise DataError("the assistant speaks first", hint="begin with a user's message")
    if not through.startswith(before):
        return None
    place = _place(words_of(messages[turn]), through, len(before), end)
    return None if place.stop is None else Answer(len(before), place.stop, end)


def answer_as_asked(
    messages: Sequence[Message], turn: int, before: str, asked: str, answered: str, end: int
) -> tuple[str, Answer]:
    """What the model is asked, and the answer after it, for templates that write them otherwise together.

    Args:
        messages: of the conversation.
        turn: of the answer.
        before: the text up to where the model is to answer.
        asked: the same of the last question by itself.
        answered: that with its answer.
        end: of the turn, in it.

    Returns:
        The text up to the answer's end, and where the answer is in it.

    Raises:
        DataError: the model would be asked to think and answers without, or the other way; or the template leaves a
            part of the answer out, or has the question in it changed.
    """
    question, content, number = words_of(messages[turn - 1]), words_of(messages[turn]), turn + 1
    same = shared(asked, answered)
    same -= len(half.group()) if (half := _HALF_TAG.search(asked[:same])) else 0
    opening, thoughts = asked[same:], asked[same:].strip()
    if not before.endswith(opening) or _place(question, asked, 0, same).stop is None:
        raise DataError(
            f"the chat template rewrites the conversation around message {number}, so that its tokens "
            "cannot be told from the others",
            _HINT,
        )
    place = _place(content, answered, same, end)
    if place.start is None or place.stop is None:
        return _with_thoughts(content, number, before, thoughts, answered[:end], answered[end:], place)
    lead, tags = answered[same : place.start], _TAG.findall(opening)
    opened = bool(thoughts) and len(tags) % 2 == bool(tags)
    if (opened and not _TAG.search(lead)) or (not opened and any(tag in content for tag in tags)):
        raise DataError(
            f"the chat template has the model answer after {opening!r}, and writes message {number}, an answer that "
            "is there, without that",
            f"set its variable for that, if it has one, as in chat_template_kwargs: enable_thinking=false; or {_HINT}",
        )
    if lead.strip() and thoughts.endswith(lead.strip()):
        lead = ""
    start, skipped = len(before), place.start - len(before) - len(lead)
    return before + lead + answered[place.start :], Answer(start, place.stop - skipped, end - skipped)


def check_questions(messages: Sequence[Message], text: str) -> None:
    """Refuse a text that lacks what the user or the system says.

    Raises:
        DataError: some templates leave the system's message out, or text that is not in a list of parts.
    """
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            continue
        content = message["content"].strip()
        if content not in text and _place(content, text, 0, len(text)).stop is None:
            raise DataError(
                f"the chat template leaves out message {number}, which is the {message['role']}'s",
                "move it into a message that the template writes, or give the model another chat template",
            )


def shared(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (one, another) in pairs if one != another), min(len(text), len(other)))


def _with_thoughts(
    content: str, number: int, before: str, opening: str, answered: str, after: str, place: _Place
) -> tuple[str, Answer]:
    """The same where the template leaves an answer's thoughts out, which begin with what the model answers after."""
    last = _lines(content)[-1]
    at = answered.rfind(last)
    if not opening or not content.strip().startswith(opening) or at < 0:
        raise DataError(
            f"the chat template leaves out a part of message {number}: {place.missing[:60]!r}",
            f"leave it out of the data; or set the template's variable for it, such as enable_thinking; or {_HINT}",
        )
    said = before + content.strip()[len(opening) :].lstrip()
    closing = answered[at + len(last) :]
    return said + closing + after, Answer(len(before), len(said), len(said) + len(closing))


def _place(content: str, text: str, start: int, end: int) -> _Place:
    content = content.strip()
    at = text.find(content, start, end)
    if at >= 0:
        return _Place(at, at + len(content))
    first = None
    for line in _lines(content):
        at = text.find(line, start, end)
        if at < 0:
            return _Place(None, None, line)
        first, start = at if first is None else first, at + len(line)
    return _Place(first, start)


def _lines(content: str) -> list[str]:
    return [line for line in _BETWEEN_LINES.split(content) if line] or [content]
