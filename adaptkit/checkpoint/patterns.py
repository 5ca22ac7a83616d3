"""Matching of untrusted regular expressions, in Python's syntax and in bounded time.

Python's own matcher cannot be stopped, and a pattern of ten characters can take it exponential time; the package
``regex`` has a time limit. What ``re`` cannot compile is refused, so only the syntax of both is used.
"""

import re
import warnings
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any

_SECONDS = 1.0
"""Limit on one match; usual patterns take microseconds."""
_MAX_LENGTH = 2000
_NAME = re.compile(r"\^((?:[\w-]|\\\W)+)\$")
"""A pattern that matches exactly one text: literal characters, possibly escaped, between ^ and $."""
_DIFFERENT = re.compile(r"\{(?!\d*,?\d*\})|\[:.*:\]")
"""What ``re`` takes literally, but ``regex`` for an approximate match or a POSIX class."""


def matches_whole(pattern: str, text: str) -> bool:
    """Return whether a pattern, a regular expression in Python's syntax, matches a whole text of printable characters.

    Raises:
        re.error: the pattern is malformed, unsupported or too long, or matching takes too long.
    """
    return _matches(pattern, pattern, text, "fullmatch")


def matches_end(pattern: str, text: str) -> bool:
    r"""Return whether a pattern matches a whole dotted path, or the rest of it after a dot: ``(.*\.)?({pattern})$``."""
    return _matches(rf"(.*\.)?({pattern})$", pattern, text)


def check_pattern(pattern: str) -> None:
    """Reject a pattern that is malformed or not supported, by a ``re.error``."""
    _compiled(pattern, pattern)


class FirstMatch:
    """Finds the first of many patterns that matches a dotted path, or the rest of it after a dot.

    Patterns that match exactly one name, of which there may be one per module, use a dict; others are tried in order.
    """

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self._patterns = patterns

    def value(self, text: str, default: Any) -> Any:
        """Return the value of the first matching pattern; ``default`` if none matches.

        Raises:
            re.error: see ``matches_whole``; only for patterns that were tried.
            AttributeError: the patterns are not a mapping.
        """
        names, others = self._split
        place, found = names.get(text, (len(self._patterns), default))
        for number, pattern, value in others:
            if number > place:
                break
            if matches_end(pattern, text):
                return value
        return found

    @cached_property
    def _split(self) -> tuple[dict[str, tuple[int, Any]], list[tuple[int, str, Any]]]:
        """Patterns that match exactly one text, as text -> (position, value); and all others in order."""
        names: dict[str, tuple[int, Any]] = {}
        others = []
        for number, (pattern, value) in enumerate(self._patterns.items()):
            name = _NAME.fullmatch(pattern) if len(pattern) <= _MAX_LENGTH else None
            if name is None:
                others.append((number, pattern, value))
            else:
                names.setdefault(re.sub(r"\\(.)", r"\1", name[1], flags=re.DOTALL), (number, value))
        return names, others


def _matches(whole: str, pattern: str, text: str, method: str = "match") -> bool:
    try:
        return getattr(_compiled(whole, pattern), method)(text, timeout=_SECONDS) is not None
    except TimeoutError as error:
        raise re.error(f"{pattern[:40]!r} takes too long to match {text[:40]!r}") from error


@lru_cache(maxsize=4096)
def _compiled(whole: str, pattern: str) -> Any:
    """Compile a pattern inside of a larger one, after ``re`` has compiled both."""
    import regex

    if len(pattern) > _MAX_LENGTH:
        raise re.error(f"the pattern is too long: {len(pattern)} characters")
    if _DIFFERENT.search(pattern):
        raise re.error(f"braces or POSIX classes are not supported here: {pattern[:40]!r}")
    try:
        with warnings.catch_warnings(action="ignore"):  # such as FutureWarning: possible nested set
            re.compile(pattern)
            re.compile(whole)
            return regex.compile(whole)
    except (OverflowError, RecursionError, regex.error) as error:
        raise re.error(str(error)) from error
