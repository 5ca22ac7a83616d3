"""What was written before an input turned out to be bad."""

from collections.abc import Iterator
from contextlib import contextmanager

from adaptkit.checkpoint.journal import Output
from adaptkit.errors import AdaptkitError

_OF_INPUTS = (2, 3, 4, 5)
"""Exit codes that say that an input, or what is asked of it, has to be another before this can work."""


@contextmanager
def discarding(output: Output) -> Iterator[None]:
    """Remove an output if the block finds its input bad, or of no use: nothing of it would belong to what comes next.

    It stays after a disk's error, an interruption or a kill, from which the same command goes on.
    """
    try:
        yield
    except AdaptkitError as error:
        if error.exit_code in _OF_INPUTS and not isinstance(error.__cause__, OSError):
            output.discard()
        raise
