"""How whoever does something long tells whoever waits for it, and how much that is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Told how much is done, of how much; in bytes unless the function that takes it says otherwise."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


def counted(count: int, noun: str) -> str:
    """How many there are of something, for people: 1 shard, 1,200 shards, 2 batches."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def size(count: float) -> str:
    """A number of bytes for people, in powers of ten: 269.0 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
