"""Progress callbacks."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total), in bytes unless the function that takes the callback says otherwise."""


def no_progress(done: int, total: int) -> None:
    """Do nothing."""
