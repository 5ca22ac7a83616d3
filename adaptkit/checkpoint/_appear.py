"""Let a finished output appear at its final name, in place of what may be replaced there."""

import errno
import os
import stat
from pathlib import Path

from adaptkit.checkpoint._clearing import remove
from adaptkit.checkpoint.place import check_output, is_empty_folder, replaced_folder
from adaptkit.checkpoint.writer import sync_folder
from adaptkit.errors import OutputExistsError, UsageError


def take_permissions(folder: Path, final: Path, added: int = 0) -> None:
    """Give an output the group and the permissions of the empty folder that it will replace, if there is one.

    Args:
        folder: where the output is written.
        final: where it will appear.
        added: further permissions, for the time of the work.

    Raises:
        UsageError: the user may not give it this group.
    """
    if not is_empty_folder(final):
        return
    state = final.stat()
    try:
        if folder.stat().st_gid != state.st_gid:
            os.chown(folder, -1, state.st_gid)
        if (mode := stat.S_IMODE(state.st_mode) | added) != stat.S_IMODE(folder.stat().st_mode):
            folder.chmod(mode)
    except OSError as error:
        raise UsageError(
            f"{final}: a new folder in its place cannot have its group and permissions: {error.strerror}",
            hint="remove it, or choose another -o",
        ) from error


def appear(folder: Path, final: Path, force: bool) -> None:
    """Rename a finished output to its final name.

    Args:
        folder: the output, complete and on the disk.
        final: its final name.
        force: replace an existing output that adaptkit made, not only an empty folder.

    Raises:
        OutputExistsError: something has appeared there in the meantime.
    """
    check_output(final, force)
    replaced = replaced_folder(final)
    take_permissions(folder, final)
    if final.exists() and not is_empty_folder(final):
        if replaced.exists():  # left by a run that was killed here
            remove(replaced)
        final.rename(replaced)
    try:
        folder.rename(final)  # over an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise OutputExistsError(f"{final}: already exists", hint="choose another -o") from error
    sync_folder(final.parent)
    if replaced.exists() and force:  # delete nothing without --force
        remove(replaced)
        sync_folder(final.parent)
