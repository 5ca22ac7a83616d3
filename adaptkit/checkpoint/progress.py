"""How whoever does something long tells whoever waits for it; and counts, sizes and names in words."""

from collections.abc import Callable, Sequence

Progress = Callable[[int, int], None]
"""Told how much is done, of how much; in bytes unless the function that takes it says otherwise."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


_OF_ONE = {"are": "is", "have": "has"}


def counted(count: int, noun: str, verb: str = "") -> str:
    """How many there are of something, for people, and what they do: 1 shard, 1,200 shards, 1 row has, 2 rows have.

    Args:
        count: how many.
        noun: for one of them.
        verb: for many of them, if something is said of them.
    """
    if count != 1:
        return f"{count:,} {_with_s(noun)} {verb}".rstrip()
    return f"1 {noun} {_OF_ONE.get(verb) or _with_s(verb)}" if verb else f"1 {noun}"


def _with_s(word: str) -> str:
    """Many of a noun, or what one does of a verb."""
    for end, instead in (("ix", "ices"), ("ry", "ries"), ("ch", "ches")):
        if word.endswith(end):
            return word.removesuffix(end) + instead
    return f"{word}s"


def first_few(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def size(count: float) -> str:
    """A number of bytes for people, in powers of ten: 269.0 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
