"""The exceptions that adaptkit raises deliberately.

Each error carries one clear message, a hint (the next thing to try), the exit code of the command line, and whether
retrying unchanged may succeed.
"""

import errno
import re
from typing import ClassVar


class AdaptkitError(Exception):
    """Base of every deliberate error: what was found, expected, and where; and what to try next, or no hint."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advise(hint)

    def advise(self, hint: str) -> None:
        """Set the hint. A traceback shows it below the message, in a notebook too."""
        self.hint = hint
        self.__notes__ = [f"hint: {hint}"] if hint else []

    @property
    def code(self) -> str:
        """The error's name for programs: the class name in snake case, without ``_error``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__.removesuffix("Error")).lower()


class UsageError(AdaptkitError):
    """The request cannot be carried out as it was made."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file holds an unknown key or an unusable value."""


class IntegrityError(AdaptkitError):
    """Bytes differ from what their manifest or record promises."""

    exit_code = 3


class DriftError(IntegrityError):
    """A source, an option or a result differs from what the lock of a recipe says."""


class BaseMismatchError(AdaptkitError):
    """An adapter or a record was made for other tensors."""

    exit_code = 4


class UnsafeInputError(AdaptkitError):
    """Input that is malformed, or that asks for something unsafe."""

    exit_code = 5


class CheckpointError(UnsafeInputError):
    """A file or folder is not the checkpoint it was taken for."""


class AdapterError(UnsafeInputError):
    """An adapter is malformed, or needs something that is not supported."""


class DataError(UnsafeInputError):
    """Training or evaluation data cannot be used as it is."""


class NonFiniteError(UnsafeInputError):
    """A tensor holds NaN or infinity."""


class AuthenticationError(AdaptkitError):
    """The Hub refused the token, or there was none."""

    exit_code = 6


class NetworkError(AdaptkitError):
    """The Hub could not be reached, or returned a temporary error."""

    exit_code = 7
    retryable = True


class ConflictError(AdaptkitError):
    """The output already exists, or the remote was changed in the meantime."""

    exit_code = 8


class OutputExistsError(ConflictError):
    """The output folder exists; nothing is overwritten unless asked for."""


class GateError(AdaptkitError):
    """A release is stopped: a metric is outside its limits, or another program would not accept the output."""

    exit_code = 9


DISK_HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "check the disk, or copy what can still be read to another one",
    errno.EROFS: "choose a location on a writable disk",
    errno.EACCES: "check the permissions, or choose a location that you may read and write",
    errno.EPERM: "check the permissions, or choose a location that you may read and write",
    errno.ENOENT: "make sure that nothing deletes files meanwhile, and that the temporary folder (TMPDIR) exists",
    errno.ESTALE: "check the network file system",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "correct the symbolic links, which form a circle",
}
"""Hints for I/O errors that can happen to any file; any other ``OSError`` is a bug in adaptkit."""


def install_hint(extra: str) -> str:
    """Return the hint for a package that is not installed, but by an extra of adaptkit, such as ``train``."""
    return f"pip install '.[{extra}]' in adaptkit's checkout"
