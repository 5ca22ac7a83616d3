"""Values of rows: JSON in which no key is repeated, and text that tokenizers accept, also in parts.

Multimodal models have content as a list of parts, ``[{"type": "text", "text": ...}]``. Text parts are joined without a
separator, as nearly all chat templates that accept parts do; many templates accept only strings.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from adaptkit.errors import DataError

SURROGATE_HINT = "write characters beyond U+FFFF whole, or as surrogate pairs"
_DEEPEST = 64
_HALF = re.compile("[\ud800-\udfff]")
_KINDS = (str, int, float, bool, type(None))
_PART_KEYS = {"type", "text"}


def parse(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError, RecursionError: it is not JSON, is nested too deeply, or repeats a key in an object.
    """
    return json.loads(text, object_pairs_hook=_mapping)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"the key {repeated(name for name, _ in pairs)!r} appears twice")
    return found


def repeated(names: Iterable[str]) -> str | None:
    """Return the first name that occurs more than once, in linear time; None if there is none."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def is_text(value: Any) -> bool:
    """Return whether a value is a string that tokenizers accept: JSON escapes can encode unpaired surrogates."""
    return isinstance(value, str) and _HALF.search(value) is None


def found_in(value: Any) -> str:
    """Describe a value that was found instead of text, for error messages."""
    if value is None:
        return "null"
    return "an unpaired surrogate" if isinstance(value, str) else type(value).__name__


def check_value(value: Any, what: str, depth: int = 0) -> None:
    """Check a value that a template will write as JSON.

    Raises:
        DataError: it is nested too deeply, is not JSON, or has an unpaired surrogate.
    """
    if depth > _DEEPEST:
        raise DataError(f"{what}: nested more than {_DEEPEST} levels deep", hint="leave such conversations out")
    if isinstance(value, dict | list):
        for inner in (*value, *(value.values() if isinstance(value, dict) else ())):
            check_value(inner, what, depth + 1)
    elif isinstance(value, str):
        if not is_text(value):
            raise DataError(f"{what}: expected text, found {found_in(value)}", hint=SURROGATE_HINT)
    elif type(value) not in _KINDS or (isinstance(value, float) and not math.isfinite(value)):
        raise DataError(f"{what}: {value!r} is not a JSON value", hint="write it as a string")


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
            hint = 'write parts as {"type": "text", "text": ...}; remove rows with images, video or audio'
            raise DataError(f"{where}: part {number} of its content is not text ({_kind(part)})", hint=hint)
    others = {key for part in content for key, value in part.items() if key not in _PART_KEYS and value is not None}
    return "".join(part["text"] for part in content), frozenset(map(str, others))


def _kind(part: Any) -> str:
    if not isinstance(part, dict) or "type" not in part:
        return type(part).__name__
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        return type(part.get("text")).__name__
    return str(part["type"])
