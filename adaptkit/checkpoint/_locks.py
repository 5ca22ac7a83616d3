"""File locks that keep two processes from writing the same output."""

import errno
import fcntl
import os
from pathlib import Path

from adaptkit.checkpoint.writer import disk_errors
from adaptkit.errors import ConflictError, UsageError


class Locks:
    """The locks that one output holds.

    Args:
        final: the output, for messages.
    """

    def __init__(self, final: Path) -> None:
        self._final = final
        self._held: list[int] = []

    def __len__(self) -> int:
        return len(self._held)

    def take(self, path: Path, *, shared: bool = False, flags: int = os.O_RDONLY) -> None:
        """Lock a file or folder without waiting; does nothing if this object already holds the lock.

        Args:
            path: the file or folder.
            shared: take a shared lock instead of an exclusive one.
            flags: for ``os.open``. Network file systems grant an exclusive lock only on a file open for writing.

        Raises:
            ConflictError: another process holds the lock, or has just moved the file away.
            UsageError: the file system does not support locks.
            DiskError: the file cannot be opened.
        """
        with disk_errors(path):
            handle = os.open(path, flags, 0o666)
        if any(os.path.samestat(os.fstat(handle), os.fstat(held)) for held in self._held):
            os.close(handle)
            return
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConflictError(f"{self._final}: another process is writing it", hint="wait for it to end") from (
                    error
                )
            raise UsageError(
                f"{self._final}: files cannot be locked on its disk ({error.strerror}), so two runs that write it at "
                "once would not notice each other",
                hint="choose an -o on another disk, or enable file locks (flock) on this one",
            ) from error
        self._held.append(handle)
        if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
            raise ConflictError(
                f"{self._final}: another process has just finished writing it", hint="use it, or choose another -o"
            )

    def release(self, first: int = 0) -> None:
        """Release all locks except the first ``first``."""
        while len(self._held) > first:
            os.close(self._held.pop())
