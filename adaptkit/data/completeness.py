"""Checks that the text that a chat template makes of a conversation contains every word of it."""

import re
from collections.abc import Sequence

from adaptkit.data.chat_template import HINT
from adaptkit.data.reasoning import Message, content_with_reasoning
from adaptkit.data.tool_calls import CALLS, Tools, first_missing_word, is_written, names_of
from adaptkit.errors import DataError

_BETWEEN_LINES = re.compile(r"\n|</?think>")
_SWITCH = re.compile(r"(?<!\S)/\w+")
"""Some templates remove switches such as ``/no_think`` from a message and obey them."""


def check_questions(messages: Sequence[Message], tools: Tools, text: str) -> None:
    """Refuse a text that lacks a word of the user, the system or a tool, or the name of a tool.

    Raises:
        DataError: something is missing. Some templates leave out the system message, or content that is not a list of
            parts; many do not support tools.
    """
    for number, message in enumerate(messages, 1):
        said, role = message["content"], message["role"]
        if role != "assistant" and not _is_in(said, text) and not (role == "tool" and is_written(said, text)):
            raise DataError(
                f"the chat template leaves out message {number} ({role})",
                f"move it into a message that the template writes, or {HINT}",
            )
    for name in names_of(tools):
        if name not in text:
            raise DataError(f"the chat template leaves out the tool {name}", f"remove tools from the data, or {HINT}")


def check_answers(messages: Sequence[Message], text: str) -> None:
    """Refuse a text that lacks a word of the assistant.

    Raises:
        DataError: something is missing. Many templates leave out the reasoning of earlier answers.
    """
    at = 0
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        at, missing = _search(content_with_reasoning(message), text, at)
        if missing:
            raise DataError(
                f"the chat template leaves out a part of message {number}: {missing[:60]!r}",
                f"learn only the answers, with --loss-on answers, or {HINT}",
            )
        check_calls(messages, number - 1, text[at:])


def check_calls(messages: Sequence[Message], turn: int, said: str) -> None:
    """Refuse an answer that lacks a part of its tool calls.

    Args:
        messages: messages of the conversation.
        turn: index of the answer.
        said: the answer as the template renders it.

    Raises:
        DataError: something is missing. Many templates support no tool calls, or only one at a time.
    """
    missing = first_missing_word(messages[turn].get(CALLS, ()), said)
    if missing:
        raise DataError(
            f"the chat template leaves out a part of the tool calls in message {turn + 1}: {missing[:60]!r}",
            f"leave such conversations out, or {HINT}",
        )


def _is_in(content: str, text: str) -> bool:
    return not missing(content, text) or (
        _SWITCH.search(content) is not None and not missing(_SWITCH.sub("\n", content), text)
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
