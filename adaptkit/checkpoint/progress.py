"""How whoever does something long tells whoever waits for it."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Told how much is done, of how much; in bytes unless the function that takes it says otherwise."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""
