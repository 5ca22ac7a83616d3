"""Removal of partial output when the inputs turn out to be bad."""

from collections.abc import Iterator
from contextlib import contextmanager

from adaptkit.checkpoint.journal import Output
from adaptkit.errors import AdaptkitError

_INPUT_ERROR_CODES = (2, 3, 4, 5)
"""Exit codes of errors that only other inputs or other options can fix."""


@contextmanager
def discard_on_bad_input(output: Output) -> Iterator[None]:
    """Discard a partial output if the block fails because of its inputs or options, since no later run can reuse it.

    Keep it after a disk error, an interruption or a kill, so that the same command can resume.
    """
    try:
        yield
    except AdaptkitError as error:
        if error.exit_code in _INPUT_ERROR_CODES and not isinstance(error.__cause__, OSError):
            output.discard()
        raise
