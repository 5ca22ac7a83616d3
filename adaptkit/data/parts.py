"""Message content as a list of parts, ``[{"type": "text", "text": ...}]``, as multimodal models have it.

Text parts are joined without a separator, as nearly all chat templates that accept parts do; many templates accept
only strings.
"""

from typing import Any

from adaptkit.errors import DataError

_KEYS = {"type", "text"}


def are_of_text(content: Any) -> bool:
    """Return whether a content is a non-empty list of text parts."""
    return isinstance(content, list) and bool(content) and all(_kind(part) == "text" for part in content)


def joined(content: Any, where: str) -> tuple[Any, frozenset[str]]:
    """Join the parts of a content; return the text and the parts' other keys. Any other content is returned unchanged.

    Raises:
        DataError: a part is not text.
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
