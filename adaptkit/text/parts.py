"""Content in parts, ``[{"type": "text", "text": ...}]``, as models that see or hear have it, and others in their way.

Parts of text become one text without anything between them, which is what nearly all chat templates that take parts
make of them; many templates take none.
"""

from typing import Any

from adaptkit.errors import DataError

_KEYS = {"type", "text"}


def are_of_text(content: Any) -> bool:
    """Whether a content is of parts, all of which are text."""
    return isinstance(content, list) and bool(content) and all(_kind(part) == "text" for part in content)


def joined(content: Any, where: str) -> tuple[Any, frozenset[str]]:
    """A content as one text, if it is of parts, and what these have beside their text, by key.

    Raises:
        DataError: a part is no text.
    """
    if not isinstance(content, list) or not content:
        return content, frozenset()
    for number, part in enumerate(content, 1):
        if _kind(part) != "text":
            raise DataError(
                f"{where}: part {number} of its content is not text ({_kind(part)})",
                hint='write parts as {"type": "text", "text": ...}; remove rows with images, video or audio',
            )
    others = {str(key) for part in content for key, value in part.items() if key not in _KEYS and value is not None}
    return "".join(part["text"] for part in content), frozenset(others)


def _kind(part: Any) -> str:
    if not isinstance(part, dict) or "type" not in part:
        return type(part).__name__
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        return type(part.get("text")).__name__
    return str(part["type"])
