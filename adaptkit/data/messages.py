"""Messages of a conversation: who says what, with which reasoning and tool calls, and whether it is learned.

{"role", "content"} or {"from", "value"}       content is text, or a list of text parts
"reasoning_content", "reasoning", "thinking"   an answer's reasoning; or <think>...</think> before it in the content
"tool_calls", "function_call"                  an answer's calls, see ``tool_calls``
"weight": 0, "train": false, ...               marks of several trainers that exclude an answer from the loss
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adaptkit.data.tool_calls import CALLS, calls_in, read_calls, read_result
from adaptkit.data.values import SURROGATE_HINT, found_in, is_text, joined
from adaptkit.errors import DataError

Message = dict[str, Any]
"""``role`` and ``content``, both strings; in an answer also ``reasoning_content`` if its reasoning is separate, and
``tool_calls``; in a tool's message also ``name`` and ``tool_call_id``."""

REASONING = "reasoning_content"
REASONING_FIELDS = (REASONING, "reasoning", "thinking")
"""Names of the field in data and templates."""
TAGS = ("<think>", "</think>")
"""Marks around reasoning in data, and of many templates."""
_IN_CONTENT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)

_ONE_CALL = "tool_call"
"""A role of ms-swift; such a message joins the answer or call before it into one turn."""
_WRITE = 'write messages as {"role": ..., "content": ...} or {"from": ..., "value": ...}'
_ROLES = {
    **{"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"},
    **{"developer": "system", "model": "assistant", "function_call": "assistant", "tool_call": "assistant"},
    **{"tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool"},
}
EXCLUDING = {"weight": 0, "loss": 0, "loss_scale": 0, "train": 0, "training": 0, "masked": 1}
"""Fields of a message, each with the value that excludes it from the loss.

``weight`` is OpenAI's, ``loss`` and ``loss_scale`` are ms-swift's, ``train`` and ``training`` axolotl's, ``masked``
torchtune's.
"""
_AMBIGUOUS = "mask"
"""True excludes a message from the loss in some data and includes it in others, as a loss mask does."""
_SPANS = "train_detail"
"""Axolotl's: spans of characters to learn."""


@dataclass(frozen=True)
class Turn:
    """A message as it was read.

    Attributes:
        role: system, user, assistant or tool.
        content: the text.
        learned: whether it carries loss.
        others: further fields of the ``Message``; empty ones are left out of it.
        ignored: keys that were not used.
    """

    role: str
    content: str
    learned: bool = False
    others: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    @property
    def message(self) -> Message:
        """The message, without empty fields."""
        filled = {key: value for key, value in self.others.items() if value}
        return {"role": self.role, "content": self.content, **filled}


def read_turns(row: Mapping[str, Any], column: str, where: str) -> list[Turn]:
    """Read the messages in a column of a row.

    Raises:
        DataError: it is not a list of messages, or one of them is invalid; names the message.
    """
    messages = row[column]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        found = type(messages).__name__ if not isinstance(messages, list) else "other values" if messages else "none"
        raise DataError(f"{where}: {column}: expected a list of messages, found {found}", hint=_WRITE)
    turns: list[Turn] = []
    for number, given in enumerate(messages, 1):
        message = {name: value for name, value in given.items() if value is not None}
        at = f"{where}: message {number} of {column}"
        turn, is_call = _turn(message, at), message.get("role", message.get("from")) == _ONE_CALL
        follows = is_call and turns and turns[-1].role == "assistant"
        turns.append(_with_call(turns.pop(), turn, at) if follows else turn)
    return turns


def _turn(message: Mapping[str, Any], where: str) -> Turn:
    said_by, says = ("role" if "role" in message else "from"), ("content" if "content" in message else "value")
    role, content = message.get(said_by), message.get(says)
    if not isinstance(role, str) or role not in _ROLES:
        problem, hint = f"unknown role {role!r}", f"roles: {', '.join(_ROLES)}"
        raise DataError(f"{where}: {'no role' if role is None else problem}", hint=_WRITE if role is None else hint)
    is_answer = _ROLES[role] == "assistant"
    others: dict[str, Any] = {}
    unread = frozenset[str]()
    if role in (_ONE_CALL, "function_call"):  # function_call as a role is ShareGPT's
        content, others = "", {CALLS: calls_in(content, f"{where}, its value")}
    elif _ROLES[role] == "tool":
        content, others = read_result(message, where)
    else:
        content, unread = joined(content, where)
        calls = is_answer and (message.get(CALLS) or message.get("function_call"))
        others = {CALLS: read_calls(message, where)} if calls else {}
    content = "" if content in (None, []) and others.get(CALLS) else content
    if not is_text(content):
        hint = 'write content (or value) as a string, "" if it is empty, or as a list of text parts'
        raise DataError(f"{where}: expected text, found {found_in(content)}", hint=hint)
    learned = not _is_excluded(message, where) and is_answer
    known = {said_by, says, *others, *((*REASONING_FIELDS, CALLS, "function_call") if is_answer else ())}
    # marks that hold: on an answer all, elsewhere those that exclude, since only answers are learned
    known |= {name for name, out in EXCLUDING.items() if is_answer or message.get(name) == out}
    ignored = frozenset(str(key) for key in message if key not in known)
    fields = {name: text_in(message, name, where) for name in REASONING_FIELDS if is_answer and message.get(name)}
    reasoning = read_reasoning(fields, str(content), where)
    return Turn(_ROLES[role], str(content), learned, {REASONING: reasoning} | others, ignored | unread)


def _with_call(before: Turn, call: Turn, where: str) -> Turn:
    """Append a call to the answer or call before it, as ms-swift does."""
    own = call.others[REASONING] not in ("", before.others[REASONING])
    if own or before.learned != call.learned:
        said = "only the call has this reasoning" if own else "only one of them is learned"
        hint = "write reasoning into the first of them" if own else "mark both or none to be excluded from the loss"
        raise DataError(f"{where}: the call and the answer or call before it are one turn, and {said}", hint=hint)
    calls = [*before.others.get(CALLS, ()), *call.others[CALLS]]
    return replace(before, others={**before.others, CALLS: calls}, ignored=before.ignored | call.ignored)


def _is_excluded(message: Mapping[str, Any], where: str) -> bool:
    """Return whether marks exclude a message from the loss; refuse those that do not say so clearly."""
    given = {name: message[name] for name in EXCLUDING if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            out = EXCLUDING[name]
            raise DataError(
                f"{where}: invalid {name} {value!r}",
                hint=f"use {out} or {str(bool(out)).lower()} to exclude an answer from the loss, "
                f"{1 - out} or {str(not out).lower()} to include it",
            )
    if message.get(_AMBIGUOUS) in (0, 1):
        raise DataError(
            f"{where}: has {_AMBIGUOUS}, which excludes an answer from the loss in some data and includes it in others",
            hint='remove it; "train": false excludes an answer',
        )
    excluded = {value == EXCLUDING[name] for name, value in given.items()}
    if len(excluded) > 1:
        said = " and ".join(f"{name} {value!r}" for name, value in given.items())
        raise DataError(f"{where}: {said} contradict each other", hint="remove one of them")
    if message.get(_SPANS):
        hint = 'remove it; "train": false excludes the whole answer'
        raise DataError(f"{where}: has {_SPANS}, but parts of a message cannot be excluded from the loss", hint=hint)
    return True in excluded


def read_reasoning(fields: Mapping[str, str], content: str, where: str) -> str:
    """Return the reasoning in the fields of a message; empty if there is none, or if the content has it too.

    Args:
        fields: the message's fields among ``REASONING_FIELDS``; empty text counts as absent.
        content: the message's content.
        where: place of the message, for error messages.

    Raises:
        DataError: the fields and the content differ.
    """
    given = {name: text for name, text in fields.items() if text}
    inline = split_reasoning(content)
    found = {text.strip() for text in (*given.values(), inline[0] if inline else "")} - {""}
    if len(found) > 1 or (found and inline and not inline[0].strip()):
        hint = f"keep one of: <think> in content, {', '.join(given)}" if inline else f"keep one of: {', '.join(given)}"
        raise DataError(f"{where}: has reasoning in more than one place", hint)
    return "" if inline else "".join(found)


def split_reasoning(content: str) -> tuple[str, str] | None:
    """Return the reasoning in ``<think>...</think>`` at the start of a content, and what follows; None without it."""
    inline = _IN_CONTENT.fullmatch(content)
    return (inline[1], inline[2]) if inline else None


def without_reasoning(content: str) -> str:
    """Return a content without its ``<think>...</think>``."""
    inline = split_reasoning(content)
    return inline[1].strip() if inline else content


def content_with_reasoning(message: Message) -> str:
    """Return a message's content, with reasoning of a separate field put before it as ``<think>...</think>``."""
    said: str = message["content"].strip()
    return f"<think>\n{message[REASONING].strip()}\n</think>\n\n{said}" if REASONING in message else said


def text_in(row: Mapping[str, Any], name: str, where: str) -> str:
    """Return the text in a column of a row, or in a field of a message; raise DataError if it is not text."""
    if not is_text(row[name]):
        hint = SURROGATE_HINT if isinstance(row[name], str) else f"write {name} as a string"
        raise DataError(f"{where}: {name}: expected text, found {found_in(row[name])}", hint=hint)
    return str(row[name])
