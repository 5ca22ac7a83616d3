"""Match untrusted regular expressions in bounded time.

Python's matcher backtracks, and even a pattern of ten characters can take exponential time. This matcher instead tracks
the set of all positions in the text where a part of the pattern can begin, and computes the set where it can end.
Constructs that this cannot handle, such as backreferences and lookbehind, are rejected. Nested repeats and lookaheads
can still take the fourth power of the text's length, so the work on one text is limited.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]  # the grammar is Python's own
from typing import Any

_MAX_NESTED_REPEATS, _MAX_LENGTH = 3, 2000
_MOST_WORK = 1 << 18
"""Limit on the items of a pattern tried at the positions of one text, a few tenths of a second of work; usual patterns
try thousands at most."""
_CATEGORIES = {
    _constants.CATEGORY_DIGIT: r"\d", _constants.CATEGORY_NOT_DIGIT: r"\D",
    _constants.CATEGORY_SPACE: r"\s", _constants.CATEGORY_NOT_SPACE: r"\S",
    _constants.CATEGORY_WORD: r"\w", _constants.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip
_EDGES = {
    _constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING, _constants.AT_END, _constants.AT_END_STRING,
    _constants.AT_BOUNDARY, _constants.AT_NON_BOUNDARY,
}  # fmt: skip
_ONE = {_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN}
_ASSERTS = {_constants.ASSERT, _constants.ASSERT_NOT}
_REPEATS = {_constants.MAX_REPEAT, _constants.MIN_REPEAT}
_NAME = re.compile(r"\^((?:[\w-]|\\\W)+)\$")
"""A pattern that matches exactly one text: literal characters, possibly escaped, between ^ and $."""
_PLAIN = re.compile(r"[\w.-]+")
"""A pattern without operators except the dot: each character matches one character."""


def matches_whole(pattern: str, text: str, after: str = "") -> bool:
    """Return whether a pattern matches a whole text.

    Args:
        pattern: a regular expression in Python's syntax.
        text: printable characters.
        after: if not empty, the pattern may instead match the rest of the text after any occurrence of this string.

    Raises:
        re.error: the pattern is malformed, unsupported or too long, or the text is too long.
    """
    _check_name(text)
    begins = {0} | {i + len(after) for i in range(len(text)) if after and text.startswith(after, i)}
    return len(text) in _Matcher(text).ends(_parsed(pattern), begins)


def matches_behind_dot(pattern: str, text: str) -> bool:
    r"""Return whether the pattern ``.*\.{pattern}$`` matches; without a group, so ``a|b`` means ``.*\.a`` or ``b$``.

    Args:
        pattern: see ``matches_whole``.
        text: printable characters.

    Raises:
        re.error: see ``matches_whole``.
    """
    if _PLAIN.fullmatch(pattern):  # fast path, since there may be one for every module
        tail = text[-len(pattern) :]
        return text[: -len(pattern)].endswith(".") and all(a in (".", b) for a, b in zip(pattern, tail, strict=True))
    _check_name(text)
    return bool(_Matcher(text).ends(_parsed(rf".*\.{pattern}$"), {0}))


def check_pattern(pattern: str) -> None:
    """Reject a pattern that is malformed or not supported.

    Raises:
        re.error: says why.
    """
    _parsed(pattern)


class FirstMatch:
    """Finds the first of many patterns that matches a dotted path, or the rest of it after a dot.

    Patterns that match exactly one name, of which there may be one per module, use a dict; others are tried in order.

    Args:
        patterns: maps patterns, in order, to their values.
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
        if self._patterns:
            _check_name(text)
        for number, pattern, value in others:
            if number > place:
                break
            if matches_whole(pattern, text, after="."):
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


def _check_name(text: str) -> None:
    if len(text) > _MAX_LENGTH:
        raise re.error(f"the name is too long: {len(text)} characters")


@lru_cache(maxsize=256)
def _parsed(pattern: str) -> Sequence[Any]:
    if len(pattern) > _MAX_LENGTH:
        raise re.error(f"the pattern is too long: {len(pattern)} characters")
    try:
        with warnings.catch_warnings(action="ignore"):  # such as FutureWarning: possible nested set
            tree = _parser.parse(pattern)
        _check(tree, 0)
    except (OverflowError, RecursionError) as error:
        raise re.error(str(error)) from error
    if tree.state.flags & ~re.UNICODE:
        raise re.error("flags are not supported")
    return tuple(tree)


def _check(nodes: Iterable[Any], repeats: int) -> None:
    """Reject constructs that ``_Matcher`` does not support.

    Raises:
        re.error: names the construct.
    """
    for kind, detail in nodes:
        if kind is _constants.BRANCH:
            for branch in detail[1]:
                _check(branch, repeats)
        elif kind is _constants.SUBPATTERN and not detail[1] and not detail[2]:
            _check(detail[3], repeats)
        elif kind in _ASSERTS and detail[0] > 0:  # lookahead
            _check(detail[1], repeats + 1)
        elif kind in _REPEATS and repeats < _MAX_NESTED_REPEATS:
            _check(detail[2], repeats + 1)
        elif kind not in _ONE and not (kind is _constants.AT and detail in _EDGES):
            raise re.error(f"{str(kind).lower()} is not supported here")


class _Matcher:
    """Matches patterns against one text.

    Args:
        text: printable characters.
    """

    def __init__(self, text: str) -> None:
        self._text, self._left = text, _MOST_WORK

    def ends(self, nodes: Iterable[Any], begins: set[int]) -> set[int]:
        """Return the positions where a part of the pattern can end if it begins at any of the given ones.

        Raises:
            re.error: this takes too long.
        """
        now, text = begins, self._text
        for kind, detail in nodes:
            if not now:
                break
            self._left -= len(now) * _width(kind, detail)
            if self._left < 0:
                raise re.error(f"it takes too long to match {text[:40]!r}")
            if kind in _ONE:
                now = {i + 1 for i in now if i < len(text) and _fits(kind, detail, text[i])}
            elif kind is _constants.BRANCH:
                now = set().union(*(self.ends(branch, now) for branch in detail[1]))
            elif kind is _constants.SUBPATTERN:
                now = self.ends(detail[3], now)
            elif kind in _REPEATS:
                now = self._repeated(detail, now)
            elif kind in _ASSERTS:
                now = {i for i in now if bool(self.ends(detail[1], {i})) == (kind is _constants.ASSERT)}
            else:
                now = {i for i in now if _is_edge(detail, text, i)}
        return now

    def _repeated(self, detail: Any, begins: set[int]) -> set[int]:
        least, most, body = detail
        now = begins
        for _ in range(least):
            before, now = now, self.ends(body, now)
            if now == before:  # fixed point: further repetitions change nothing
                break
        found, fresh, count = set(now), now, least
        while fresh and count < most:
            fresh = self.ends(body, fresh) - found
            found |= fresh
            count += 1
        return found


def _width(kind: Any, detail: Any) -> int:
    """Return the number of items of a set, or of branches, that are tried at each position."""
    return len(detail) if kind is _constants.IN else len(detail[1]) if kind is _constants.BRANCH else 1


def _is_edge(kind: Any, text: str, place: int) -> bool:
    if kind in (_constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING):
        return place == 0
    if kind in (_constants.AT_END, _constants.AT_END_STRING):
        return place == len(text)
    before, behind = (re.match(r"\w", letter) is not None for letter in (text[place - 1 : place], text[place:]))
    return (before != behind) == (kind is _constants.AT_BOUNDARY)


def _fits(kind: Any, detail: Any, letter: str) -> bool:
    if kind is _constants.ANY:
        return letter != "\n"
    if kind is _constants.LITERAL:
        return ord(letter) == int(detail)
    if kind is _constants.NOT_LITERAL:
        return ord(letter) != int(detail)
    negated = detail[0][0] is _constants.NEGATE
    for item, value in detail[negated:]:
        fits = (
            (item is _constants.LITERAL and ord(letter) == value)
            or (item is _constants.RANGE and value[0] <= ord(letter) <= value[1])
            or (item is _constants.CATEGORY and re.match(_CATEGORIES[value], letter) is not None)
        )
        if fits:
            return not negated
    return negated
