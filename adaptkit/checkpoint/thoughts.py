"""An answer's thoughts: where data have them, and where a chat template looks for them.

Data have them in the content, as ``<think>...</think>`` before the answer, or in a field of their own. Templates take
them from the content, from a field, or from both; some put other marks around them.
"""

import re
from collections.abc import Mapping
from typing import Any

FIELD = "reasoning_content"
NAMES = (FIELD, "reasoning", "thinking")
"""What data and templates call the field."""
_IN_CONTENT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_LOOKS_IN_CONTENT = re.compile(r"""split\(\s*['"]</think>|</think>['"]\s+in\b""")

Message = dict[str, str]
"""``role`` and ``content``, and of an answer ``reasoning_content`` where that is apart."""


def has_thoughts(content: str) -> bool:
    """Whether a content begins with thoughts."""
    return _IN_CONTENT.fullmatch(content) is not None


def words_of(message: Message) -> str:
    """What a message says, its thoughts in the content."""
    return Taker("").message(message)["content"]


class Taker:
    """How one chat template takes thoughts."""

    def __init__(self, template: str) -> None:
        """See the class.

        Args:
            template: its text.
        """
        self._fields = tuple(name for name in NAMES if re.search(rf"""(?:\.|['"]){name}\b""", template))
        self._looks_in_content = _LOOKS_IN_CONTENT.search(template) is not None

    def message(self, message: Message) -> Message:
        """The message for the template."""
        if message["role"] != "assistant":
            return message
        if FIELD in message:
            return self._of(message, message[FIELD], message["content"])
        inline = None if self._looks_in_content or not self._fields else _IN_CONTENT.fullmatch(message["content"])
        return message if inline is None else self._of(message, inline[1], inline[2])

    def _of(self, message: Message, thoughts: str, content: str) -> Message:
        thoughts, content = thoughts.strip(), content.strip()
        if self._fields:
            return {"role": message["role"], "content": content, **dict.fromkeys(self._fields, thoughts)}
        return {"role": message["role"], "content": f"<think>\n{thoughts}\n</think>\n\n{content}"}


def read_thoughts(message: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a message in data that hold thoughts."""
    return {name: message[name] for name in NAMES if message.get(name) not in (None, "")}
