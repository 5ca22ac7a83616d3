"""Wording of counts, sizes and lists of names in messages."""

from collections.abc import Sequence

_OF_ONE = {"are": "is", "have": "has"}


def counted(count: int, noun: str, verb: str = "") -> str:
    """Format a count with a noun in the singular and maybe a verb in the plural: 1 shard, 1,200 shards, 1 row has."""
    if count != 1:
        return f"{count:,} {_with_s(noun)} {verb}".rstrip()
    return f"1 {noun} {_OF_ONE.get(verb) or _with_s(verb)}" if verb else f"1 {noun}"


def _with_s(word: str) -> str:
    """Return the plural of a noun, or the third person singular of a verb."""
    for end, instead in (("ix", "ices"), ("ry", "ries"), ("ch", "ches"), ("s", "ses")):
        if word.endswith(end):
            return word.removesuffix(end) + instead
    return f"{word}s"


def first_few(names: Sequence[str]) -> str:
    """List the first three names, and the number of others."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def size(count: float) -> str:
    """Format a number of bytes with decimal units: 269.0 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
