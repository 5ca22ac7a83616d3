"""Values of rows: JSON in which no key is repeated, and strings that tokenizers accept."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from adaptkit.errors import DataError

SURROGATE_HINT = "write characters beyond U+FFFF whole, or as surrogate pairs"
"""Hint for errors about surrogates."""
_DEEPEST = 64
_HALF = re.compile("[\ud800-\udfff]")
_KINDS = (str, int, float, bool, type(None))


def parse(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError, RecursionError: it is not JSON, is nested too deeply, or repeats a key in an object.
    """
    return json.loads(text, object_pairs_hook=_mapping)


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


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"the key {repeated(name for name, _ in pairs)!r} appears twice")
    return found
