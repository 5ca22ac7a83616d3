"""Find the answers in the text that a chat template makes of a conversation, and check that no word of it is lost.

The prompt of an answer is the conversation before it, up to and including the opening of the answer. The answer, with
its end of turn, is what the template adds to the prompt when it renders the conversation with the answer. Some
templates render the prompt differently once the answer follows: they open answers with ``<think>``, but leave
reasoning out of existing answers; or they put the system message before the last question if nothing follows it. The
text is then the prompt, followed by what the template adds to the last question rendered by itself.

An answer is searched for from its end, which is known, because the marks before it may contain the same words. Neither
``return_assistant_tokens_mask`` nor ``continue_final_message`` of transformers would do: most templates do not mark
answers, those that do differ in whether the prompt's opening and a line end after the turn belong to them, and calls
have no content to continue.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

from adaptkit.data.chat_template import HINT
from adaptkit.data.messages import REASONING, Message, content_with_reasoning, without_reasoning
from adaptkit.data.tool_calls import CALLS, Tools, first_missing_word, is_written
from adaptkit.errors import DataError

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HALF_TAG = re.compile(r"[<\[][^<>\[\]\s]*$")
_LEADING_TAGS = re.compile(rf"(?:\s|{_TAG.pattern})*")
_LAST_TAG = re.compile(rf"({_TAG.pattern})\s*$")
_OF_REASONING = re.compile(r"think|thought|reason|channel")
_CLOSES = re.compile(r"/|end|^<[^|].*\|>$", re.IGNORECASE)
_SHOWN = 40
"""Characters that an error message shows of a prompt's end, and of an answer's beginning."""
_BETWEEN_LINES = re.compile(r"\n|</?think>")
_SWITCH = re.compile(r"(?<!\S)/\w+")
"""Some templates remove switches such as ``/no_think`` from a message and obey them."""


@dataclass(frozen=True)
class Ending:
    """Where the last answer in a text ends.

    Attributes:
        said: offset of the end of its content, in characters.
        marks: number of characters before that which are marks of the template, as after a tool call's last word.
        rest: number of characters from there to the end of its turn, after the token that ends it if that is known.
    """

    said: int
    marks: int
    rest: int


@dataclass(frozen=True)
class AnswerSpan:
    """Place of an assistant turn in a text, as character offsets: ``start <= words <= said <= end``.

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


def find_answer(messages: Sequence[Message], turn: int, before: str, through: str, ending: Ending) -> AnswerSpan | None:
    """Locate an answer, ``messages[turn]``, in the text of a conversation that ends with it.

    Args:
        messages: messages of the conversation.
        turn: index of the answer.
        before: the prompt: the text up to where the model answers.
        through: the text up to the answer's end, and what the template puts after it.
        ending: where the answer ends in ``through``.

    Returns:
        The answer's place; None if the template rewrites the text before the answer, or leaves out a part of it.

    Raises:
        DataError: the assistant speaks first; the prompt opens reasoning but the answer has none, or the reverse; or a
            part of its tool calls is missing.
    """
    if turn == 0:
        raise DataError("the first message is the assistant's", hint="begin with a user message")
    content, opened = content_with_reasoning(messages[turn]), _LAST_TAG.search(before)
    content = content.removeprefix(opened[1]) if opened else content  # a mark that the prompt already contains
    said = through[len(before) : ending.said]
    if not through.startswith(before) or missing(content, said):
        return None
    check_calls(messages, turn, said)
    return _placed(messages, turn, before, said, ending)


def answer_as_asked(
    messages: Sequence[Message], turn: int, before: str, asked: str, answered: str, ending: Ending
) -> tuple[str, AnswerSpan]:
    """Join a prompt and its answer, for templates that change the prompt once the answer follows.

    Args:
        messages: messages of the conversation.
        turn: index of the answer.
        before: the prompt: the text up to where the model answers.
        asked: the prompt of the last question by itself.
        answered: the last question by itself, with its answer.
        ending: where the answer ends in ``answered``.

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
    if not (before.endswith(opening) and is_there) or messages[turn - 1]["role"] == "assistant":
        said = f"the chat template rewrites the conversation around message {turn + 1}"
        raise DataError(f"{said}, so its tokens cannot be identified", HINT)
    said, mark = answered[same : ending.said], opening.strip()
    between, opened, rest = said.partition(mark) if mark else (said, "", "")
    if opened and between.strip() and not missing(content, rest):
        raise ended_late(before, said)
    if mark and not _TAG.search(opening):
        raise _otherwise(opening, turn, True)
    lost = missing(content, said)
    if mark and content.startswith(mark) and said.rstrip().endswith(lines(content)[-1]):  # the template drops reasoning
        said, lost = content[len(mark) :].lstrip(), ""
    if lost:
        raise _left_out(lost, turn)
    check_calls(messages, turn, said)
    lead = _lead(said, content) if content or CALLS not in messages[turn] else _overlap(opening, said)
    if lead.strip() and mark.endswith(lead.strip()):  # prompt and answer both end the reasoning
        said = said[len(lead) :]
    return before + said + answered[ending.said :], _placed(messages, turn, before, said, ending)


def _placed(messages: Sequence[Message], turn: int, before: str, said: str, ending: Ending) -> AnswerSpan:
    """Return the place of an answer with the rendered content ``said``; it must continue the prompt's reasoning."""
    content, start = content_with_reasoning(messages[turn]), len(before)
    if content.startswith("<think>") and said.rstrip().endswith(content) and "think" in _kinds(_lead(said, content)):
        said = f"the chat template adds reasoning of its own before that of message {turn + 1}"
        raise DataError(said, f"remove reasoning from the data, or {HINT}")
    last = _LAST_TAG.search(before)
    if last and not content_with_reasoning(messages[turn - 1]).endswith(last[1]):
        _check_continued(last, said, content, turn)
    kept = len(said.rstrip()) if content else len(said)
    words, end = min(kept, len(said) - ending.marks), len(said) + ending.rest
    return AnswerSpan(start, start + words, start + kept, start + end)


def _check_continued(last: re.Match[str], said: str, content: str, turn: int) -> None:
    """Refuse an answer without reasoning after a prompt whose last tag opens it, or with it after one that closes."""
    kind = _kind(last[1])
    if not _OF_REASONING.search(kind):
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


def _left_out(lost: str, turn: int) -> DataError:
    return DataError(
        f"the chat template leaves out a part of message {turn + 1}: {lost[:60]!r}",
        f"remove it from the data, set the template's variable for it, such as enable_thinking, or {HINT}",
    )


def ended_late(before: str, said: str) -> DataError:
    """Return the error for a prompt whose end the template writes only before an answer, which would learn it."""
    return DataError(
        f"the chat template ends a question only once it is answered: the prompt ends with {before[-_SHOWN:]!r}, and "
        f"the answer would begin with {said[:_SHOWN]!r}",
        f"make the template end a question that is the last message, too, or {HINT}",
    )


def closes_a_turn(opening: str) -> bool:
    """Return whether a text begins with a tag such as ``</user>`` or ``[/INST]``, but not of reasoning."""
    tag = _TAG.match(opening.lstrip())
    return tag is not None and "/" in tag[0] and not _OF_REASONING.search(_kind(tag[0]))


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


def shared(text: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    return len(commonprefix((text, other)))  # noqa: RUF071


def check_questions(messages: Sequence[Message], tools: Tools, text: str) -> None:
    """Refuse a text that lacks a word of the user, the system or a tool, or the name of a tool.

    Some templates leave out the system message, or content that is not a list of parts; many do not support tools.
    """
    for number, message in enumerate(messages, 1):
        said, role = message["content"], message["role"]
        if role == "assistant" or not missing(said, text) or (role == "tool" and is_written(said, text)):
            continue
        if not _SWITCH.search(said) or missing(_SWITCH.sub("\n", said), text):
            hint = f"move it into a message that the template writes, or {HINT}"
            raise DataError(f"the chat template leaves out message {number} ({role})", hint=hint)
    for name in (str(tool["function"]["name"]) for tool in tools):
        if name not in text:
            raise DataError(f"the chat template leaves out the tool {name}", f"remove tools from the data, or {HINT}")


def check_answers(messages: Sequence[Message], text: str) -> None:
    """Refuse a text that lacks a word of the assistant: many templates leave out the reasoning of earlier answers."""
    at = 0
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            at, lost = _search(content_with_reasoning(message), text, at)
            if lost:
                hint = f"learn only the answers, with --loss-on answers, or {HINT}"
                raise DataError(f"the chat template leaves out a part of message {turn + 1}: {lost[:60]!r}", hint=hint)
            check_calls(messages, turn, text[at:])


def check_turn(messages: Sequence[Message], turn: int, said: str) -> None:
    """Refuse an answer with calls if the template's text of it, ``said``, lacks a part of its content or calls."""
    if lost := missing(without_reasoning(messages[turn]["content"]), said):
        raise _left_out(lost, turn)
    check_calls(messages, turn, said)


def check_calls(messages: Sequence[Message], turn: int, said: str) -> None:
    """Refuse an answer if the template's text of it, ``said``, lacks a part of its calls: many support only one."""
    for words in (messages[turn].get(REASONING, ""), messages[turn]["content"]):  # which may mention the same
        said = said.replace(words.strip(), "", 1)
    lost = first_missing_word(messages[turn].get(CALLS, ()), said)
    if lost:
        raise DataError(
            f"the chat template leaves out a part of the tool calls in message {turn + 1}: {lost[:60]!r}",
            f"leave such conversations out, or {HINT}",
        )


def missing(content: str, text: str) -> str:
    """Return the first line of a content that a text does not contain after the others; empty if none is missing."""
    return _search(content, text, 0)[1]


def _search(content: str, text: str, at: int) -> tuple[int, str]:
    """Return where a content ends in a text, searching from ``at``, and the first missing line or an empty string."""
    content = content.strip()
    found = text.find(content, at)
    if found >= 0:
        return found + len(content), ""
    for line in lines(content):
        found = text.find(line, at)
        if found < 0:
            return at, line
        at = found + len(line)
    return at, ""


def lines(content: str) -> list[str]:
    """Return the non-empty lines of a content, without the marks of reasoning; at least one."""
    return [line for part in _BETWEEN_LINES.split(content) if (line := part.strip())] or [content]
