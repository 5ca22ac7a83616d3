"""An answer's reasoning: where data have it, and where a chat template reads it.

Data have it in the content, as ``<think>...</think>`` before the answer, or in a separate field. Templates read it from
the content, from a field, or from both; some write other tags around it, and some do not support it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptkit.errors import DataError

Message = dict[str, Any]
"""``role`` and ``content``, both strings; in an answer also ``reasoning_content`` if its reasoning is separate, and
``tool_calls``; in a tool's message also ``name`` and ``tool_call_id``. See ``tool_calls``."""

FIELD = "reasoning_content"
NAMES = (FIELD, "reasoning", "thinking")
"""Names of the field in data and templates."""
TAGS = ("<think>", "</think>")
"""Marks around reasoning in data, and of many templates."""
_IN_CONTENT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_QUESTION = {"role": "user", "content": "question"}
_REASONING, _ANSWER = "inkling", "answer"


def read_reasoning(fields: Mapping[str, str], content: str, where: str) -> str:
    """Return the reasoning in the fields of a message; empty if there is none, or if the content has it too.

    Args:
        fields: the message's fields among ``NAMES``; empty text counts as absent.
        content: the message's content.
        where: place of the message, for error messages.

    Raises:
        DataError: the fields and the content differ.
    """
    given = {name: text for name, text in fields.items() if text}
    inline = _IN_CONTENT.fullmatch(content)
    found = {text.strip() for text in (*given.values(), inline[1] if inline else "")} - {""}
    if len(found) > 1 or (found and inline and not inline[1].strip()):
        hint = f"keep one of: <think> in content, {', '.join(given)}" if inline else f"keep one of: {', '.join(given)}"
        raise DataError(f"{where}: has reasoning in more than one place", hint)
    return "" if inline else "".join(found)


def content_with_reasoning(message: Message) -> str:
    """Return a message's content, with reasoning of a separate field put before it as ``<think>...</think>``."""
    said: str = message["content"]
    return _in_content(message[FIELD], said) if FIELD in message else said.strip()


def without_reasoning(content: str) -> str:
    """Return a content without its ``<think>...</think>``."""
    inline = _IN_CONTENT.fullmatch(content)
    return inline[2].strip() if inline else content


class ReasoningFields:
    """Where one chat template reads reasoning; found out by rendering probes.

    Args:
        render: returns the rendered text of a conversation; "" if the template refuses it.
    """

    def __init__(self, render: Callable[[Sequence[Message]], str]) -> None:
        def written(**answer: str) -> str:
            return render([_QUESTION, {"role": "assistant", **answer}])

        names = NAMES if written(content=_ANSWER) else ()
        self._names = tuple(name for name in names if _REASONING in written(content=_ANSWER, **{name: _REASONING}))
        self._knows_content = True
        if not self._names:
            return
        apart = written(content=_ANSWER, **dict.fromkeys(self._names, _REASONING))
        inline = written(content=_in_content(_REASONING, _ANSWER))
        self._knows_content = "".join(apart.split()) == "".join(inline.split())

    def message(self, message: Message) -> Message:
        """Return a message with its reasoning where the template reads them."""
        if message["role"] != "assistant":
            return message
        others = {name: value for name, value in message.items() if name not in (FIELD, "content")}
        if FIELD in message:
            return others | self._apart(message[FIELD], message["content"])
        inline = _IN_CONTENT.fullmatch(message["content"]) if self._names and not self._knows_content else None
        return message if inline is None else others | self._apart(inline[1], inline[2])

    def _apart(self, reasoning: str, content: str) -> Message:
        if not self._names:
            return {"content": _in_content(reasoning, content)}
        return {"content": content.strip(), **dict.fromkeys(self._names, reasoning.strip())}


def _in_content(reasoning: str, content: str) -> str:
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{content.strip()}"
