"""Locate the answers in the text that a chat template makes of a conversation.

The prompt of an answer is the conversation before it, up to and including the opening of the answer. The answer, with
its end of turn, is what the template adds to the prompt when it renders the conversation with the answer. Some
templates render the prompt differently once the answer follows: they open answers with ``<think>``, but leave
reasoning out of existing answers; or they put the system message before the last question if nothing follows it. The
text is then the prompt, followed by what the template adds to the last question rendered by itself. No word of a
message may be lost.

An answer is searched for from its end, which is known, because the marks before it may contain the same words.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from adaptkit.data.chat_template import HINT
from adaptkit.data.completeness import check_calls, lines, missing
from adaptkit.data.reasoning import Message, content_with_reasoning
from adaptkit.data.tool_calls import CALLS, end_of_words, is_written
from adaptkit.errors import DataError

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HALF_TAG = re.compile(r"[<\[][^<>\[\]\s]*$")
_LEADING_TAGS = re.compile(rf"(?:\s|{_TAG.pattern})*")
_LAST_TAG = re.compile(rf"({_TAG.pattern})\s*$")
_OF_REASONING = re.compile(r"think|thought|reason|channel")
_SHOWN = 40
"""Characters that an error message shows of a prompt's end, and of an answer's beginning."""
_CLOSES = re.compile(r"/|end|^<[^|].*\|>$", re.IGNORECASE)


@dataclass(frozen=True)
class Ends:
    """Where the last answer in a text ends, as character offsets.

    Attributes:
        words: end of its last word; in a tool call, marks of the template follow.
        said: end of its content.
        turn: end of its turn, after the token that ends it if the template's is known.
    """

    words: int
    said: int
    turn: int


@dataclass(frozen=True)
class Answer:
    """Place of an assistant turn in a text, as character offsets.

    Attributes:
        start: end of its opening.
        words: end of its last word; the token that ends the turn comes after it.
        said: end of its content.
        end: end of the turn.
    """

    start: int
    words: int
    said: int
    end: int


def ends_of(message: Message, text: str, closing: tuple[str, int] | None) -> Ends:
    """Return where the last answer in a text ends.

    Args:
        message: the answer.
        text: text whose last message is the answer.
        closing: what the template puts after such an answer, and how many characters of that come after the turn;
            None if unknown.
    """
    if closing is not None and text.endswith(closing[0]):
        said = len(text) - len(closing[0])
        return Ends(said, said, len(text) - closing[1])
    if CALLS in message:
        after = closing[0][len(closing[0]) - closing[1] :] if closing is not None else ""
        turn = text.removesuffix(after)
        return Ends(end_of_words(message[CALLS], turn), len(turn.rstrip()), len(turn))
    last = lines(content_with_reasoning(message))[-1]
    at = text.rfind(last)
    said = len(text) if at < 0 else at + len(last)
    return Ends(said, said, len(text))


def find_answer(messages: Sequence[Message], turn: int, before: str, through: str, ends: Ends) -> Answer | None:
    """Locate an answer in the text of a conversation that ends with it.

    Args:
        messages: messages of the conversation.
        turn: index of the answer.
        before: the prompt: the text up to where the model answers.
        through: the text up to the answer's end, and what the template puts after it.
        ends: where the answer ends in ``through``.

    Returns:
        The answer's place; None if the template rewrites the text before the answer, or leaves out a part of it.

    Raises:
        DataError: the assistant speaks first; the prompt opens reasoning but the answer has none, or the reverse; or a
            part of its tool calls is missing.
    """
    if turn == 0:
        raise DataError("the first message is the assistant's", hint="begin with a user message")
    content, opened = content_with_reasoning(messages[turn]), _LAST_TAG.search(before)
    said = content.removeprefix(opened[1]) if opened else content  # a mark that the prompt already contains
    if not through.startswith(before) or missing(said, through[len(before) : ends.said]):
        return None
    check_calls(messages, turn, through[len(before) : ends.said])
    _check_reasoning(before, through[len(before) : ends.said], messages, turn)
    said_to = len(through[: ends.said].rstrip()) if content else ends.said
    return Answer(len(before), min(ends.words, said_to), said_to, ends.turn)


def opening_of(message: Message, text: str, answer: Answer) -> str:
    """Return what a template puts between the prompt of an answer that calls no tools and its first word."""
    said, content = text[answer.start : answer.said], content_with_reasoning(message)
    return said[: max(0, said.find(lines(content)[0]))] if content else said


def closes_a_turn(opening: str) -> bool:
    """Return whether a text begins with a tag such as ``</user>`` or ``[/INST]``, but not of reasoning."""
    tag = _TAG.match(opening.lstrip())
    return tag is not None and "/" in tag[0] and not _OF_REASONING.search(_kind(tag[0]))


def ended_late(before: str, said: str) -> DataError:
    """Return the error for a prompt whose end the template writes only before an answer, which would learn it."""
    return DataError(
        f"the chat template ends a question only once it is answered: the prompt ends with {before[-_SHOWN:]!r}, and "
        f"the answer would begin with {said[:_SHOWN]!r}",
        f"make the template end a question that is the last message, too, or {HINT}",
    )


def with_question(messages: Sequence[Message], turn: int) -> list[Message]:
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


def answer_as_asked(
    messages: Sequence[Message], turn: int, before: str, asked: str, answered: str, ends: Ends
) -> tuple[str, Answer]:
    """Join a prompt and its answer, for templates that change the prompt once the answer follows.

    Args:
        messages: messages of the conversation.
        turn: index of the answer.
        before: the prompt: the text up to where the model answers.
        asked: the prompt of the last question by itself.
        answered: the last question by itself, with its answer.
        ends: where the answer ends in ``answered``.

    Returns:
        The text up to the answer's end, and the answer's place in it.

    Raises:
        DataError: the prompt opens reasoning but the answer has none, or the reverse; or the template leaves out a
            part of the answer, or changes the question itself, or ends it only before an answer.
    """
    question, content = content_with_reasoning(messages[turn - 1]), content_with_reasoning(messages[turn])
    same = shared(asked, answered)
    same -= len(half.group()) if (half := _HALF_TAG.search(asked[:same])) else 0
    opening = asked[same:]
    is_there = not missing(question, asked[:same]) or is_written(question, asked[:same])
    is_asked_alike = before.endswith(opening) and is_there
    if not is_asked_alike or messages[turn - 1]["role"] == "assistant":
        raise DataError(
            f"the chat template rewrites the conversation around message {turn + 1}, so its tokens "
            "cannot be identified",
            HINT,
        )
    said, closing, mark = answered[same : ends.said], answered[ends.said :], opening.strip()
    between, opened, rest = said.partition(mark) if mark else (said, "", "")
    if opened and between.strip() and not missing(content, rest):
        raise ended_late(before, said)
    if mark and not _TAG.search(opening):
        raise _otherwise(opening, turn, True)
    marks = ends.said - ends.words  # marks of a tool call after its last word
    lost = missing(content, said)
    if mark and content.startswith(mark) and said.rstrip().endswith(lines(content)[-1]):  # the template drops reasoning
        said, lost = content[len(mark) :].lstrip(), ""
    if lost:
        raise DataError(
            f"the chat template leaves out a part of message {turn + 1}: {lost[:60]!r}",
            f"remove it from the data, set the template's variable for it, such as enable_thinking, or {HINT}",
        )
    check_calls(messages, turn, said)
    lead = _lead(said, content) if content or CALLS not in messages[turn] else _overlap(opening, said)
    if lead.strip() and mark.endswith(lead.strip()):  # prompt and answer both end the reasoning
        said = said[len(lead) :]
    _check_reasoning(before, said, messages, turn)
    kept = len(said.rstrip()) if content else len(said)
    start = len(before)
    end = start + len(said) + ends.turn - ends.said
    return before + said + closing, Answer(start, start + min(kept, len(said) - marks), start + kept, end)


def shared(text: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (one, another) in pairs if one != another), min(len(text), len(other)))


def _check_reasoning(before: str, said: str, messages: Sequence[Message], turn: int) -> None:
    """Refuse an answer without reasoning after a prompt that opens it, or with reasoning after one that closed it.

    Args:
        before: the prompt.
        said: the answer as the template renders it.
        messages: messages of the conversation.
        turn: index of the answer.
    """
    content = content_with_reasoning(messages[turn])
    if content.startswith("<think>") and said.rstrip().endswith(content) and "think" in _kinds(_lead(said, content)):
        raise DataError(
            f"the chat template adds reasoning of its own before that of message {turn + 1}",
            f"remove reasoning from the data, or {HINT}",
        )
    last = _LAST_TAG.search(before)
    kind = _kind(last[1]) if last else ""
    if last is None or not _OF_REASONING.search(kind) or content_with_reasoning(messages[turn - 1]).endswith(last[1]):
        return
    begun, thinks, found = not _CLOSES.search(last[1]), content.startswith("<think>"), _LEADING_TAGS.match(said)
    tags = [tag for tag in _TAG.findall(said) if _kind(tag) == kind]
    leads = kind in _kinds(found[0] if found else "")
    closes = bool(tags and _CLOSES.search(tags[0]))
    if begun:  # reasoning may mention such marks
        refused = not closes and not (thinks and not leads and any(map(_CLOSES.search, tags)))
    else:  # an answer may, too
        refused = leads or closes or (thinks and bool(tags))
    if refused:
        raise _otherwise(last[0], turn, begun)


def _otherwise(opening: str, turn: int, begun: bool) -> DataError:
    setting, other = ("false", "add reasoning to the answers") if begun else ("true", "remove reasoning from the data")
    return DataError(
        f"the chat template opens answers with {opening!r}, but message {turn + 1}, an answer, does not continue that",
        f"set its variable for reasoning, such as --chat-template-kwargs enable_thinking={setting}, or {other}",
    )


def _kind(tag: str) -> str:
    """Return what the tags that open and close reasoning have in common."""
    return re.sub(r"start|begin|end|[^a-z]", "", tag.lower())


def _kinds(text: str) -> set[str]:
    return {_kind(tag) for tag in _TAG.findall(text)} - {""}


def _lead(said: str, content: str) -> str:
    """Return the template's marks before an answer."""
    whole = said.rstrip()
    if whole.endswith(content):
        return whole[: len(whole) - len(content)] if content else said
    found = _LEADING_TAGS.match(said)
    return found[0] if found else ""


def _overlap(text: str, other: str) -> str:
    """Return the longest suffix of a text that the other text begins with."""
    return next(text[place:] for place in range(len(text) + 1) if other.startswith(text[place:]))
