"""Check where an output may be written and what it may replace, let it appear there, and delete what adaptkit made.

Deletion goes in an order that leaves folders recognizable as adaptkit's if it is interrupted.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Collection, Iterable
from pathlib import Path

from adaptkit.checkpoint.integrity import present_names
from adaptkit.checkpoint.layout import JOURNAL_NAME
from adaptkit.checkpoint.manifest import MANIFEST_NAME, require_manifest
from adaptkit.checkpoint.writer import disk_errors, sync_folder
from adaptkit.errors import DISK_HINTS, AdaptkitError, ConflictError, IntegrityError, OutputExistsError, UsageError
from adaptkit.wording import first_few

_PARTIAL, _REPLACED = ".partial", ".replaced"
_LONGEST_NAME = 255  # bytes, on every usual file system
_MOUNTS = Path("/proc/self/mountinfo")  # of Linux
_ELSEWHERE = "choose another -o"
_ASIDE = "move or delete it, or choose another -o"


def partial_folder(final: Path) -> Path:
    """Return the folder where an output is written before it appears; an interrupted run leaves it there."""
    return final.with_name(final.name + _PARTIAL)


def replaced_folder(final: Path) -> Path:
    """Return the folder where an old output is kept until the new one is in place."""
    return final.with_name(final.name + _REPLACED)


def is_unfinished(path: Path) -> bool:
    """Return whether a folder's name is that of a partial or replaced output."""
    return path.name.endswith((_PARTIAL, _REPLACED))


def check_output(final: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Reject an output that exists, unless it may be replaced, and one that would change an input or an artifact.

    An empty folder may always be replaced: scripts often make one first.

    Raises:
        OutputExistsError: it exists and may not be replaced.
        ConflictError: a foreign folder is where the old output would be kept.
        UsageError: for another reason, nothing can be written or renamed there.
    """
    if final.name in ("", ".."):
        raise UsageError(f"{final}: is not a name for a new folder", hint="name the folder to create, such as -o out")
    aside = replaced_folder(final)
    if len(os.fsencode(aside.name)) > _LONGEST_NAME:
        raise UsageError(f"{final}: the name is too long", hint="choose a shorter name")
    try:
        final.lstat()
    except FileNotFoundError as error:
        link = next((parent for parent in final.parents if parent.is_symlink() and not parent.exists()), None)
        if link is not None:
            raise UsageError(f"{final}: cannot be written: {link} is a link to nothing", hint=_ELSEWHERE) from error
    except OSError as error:  # such as a file or a circle of links in its path
        raise UsageError(f"{final}: cannot be written: {error.strerror}", hint=_ELSEWHERE) from error
    for path in (final, partial_folder(final), aside):
        if _is_mount_point(path):
            hint = f"choose a new folder inside it, such as -o {final / 'out'}" if path == final else "unmount it"
            raise UsageError(f"{path}: is a mount point, which cannot be renamed", hint=f"{hint}, or choose another -o")
    if os.path.lexists(final) and not force and not is_empty_folder(final):
        raise OutputExistsError(f"{final}: already exists", hint=_hint_to_replace(final, inputs))
    whole = Path(os.path.realpath(final))
    for path in inputs:
        source = Path(os.path.realpath(path))
        for work in (partial_folder(whole), replaced_folder(whole)):
            if source.is_relative_to(work):
                raise UsageError(f"{final}: its unfinished work would overwrite the input {path}", hint=_ELSEWHERE)
        inside = whole != source and whole.is_relative_to(source)
        if inside or (force and source.is_relative_to(whole)):
            raise UsageError(f"{final}: the output would change its own input {path}", hint=_ELSEWHERE)
    if is_unfinished(final):
        reserved = f"names that end in {_PARTIAL} or {_REPLACED} are reserved for unfinished work"
        raise UsageError(f"{final}: {reserved}", hint=_ELSEWHERE)
    if os.path.lexists(aside) and not is_replaced_output(aside):
        raise ConflictError(f"{aside}: is in the way, and adaptkit did not make it", f"move it, or {_ELSEWHERE}")
    if os.path.lexists(final):
        _check_replaceable(final)
    refuse_inside_artifact(final.parent, f"{final}: is", "-o")
    require_writable_parent(final, _ELSEWHERE)
    if os.path.lexists(final):
        _check_owner(final)


def is_empty_folder(path: Path) -> bool:
    """Return whether this is a folder, not a link to one, that holds nothing."""
    try:
        return not path.is_symlink() and path.is_dir() and not any(path.iterdir())
    except OSError:  # it may not be read
        return False


def refuse_inside_artifact(folder: Path, what: str, option: str) -> None:
    """Refuse to write into an artifact; ``what`` begins the message, such as "out: is", ``option`` ends the hint."""
    whole = Path(os.path.realpath(folder))
    for path in (whole, *whole.parents):
        if os.path.isfile(path / MANIFEST_NAME) and not is_unfinished(path):  # a run was killed before its last rename
            problem = f"{what} inside the artifact {path}, which would no longer match its manifest"
            raise UsageError(problem, hint=f"choose another {option}")


def require_writable_parent(path: Path, hint: str) -> None:
    """Check that something can be made at a path, whose parent folders may be missing; a UsageError otherwise."""
    there = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not os.access(there, os.W_OK | os.X_OK):
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            problem, hint = os.strerror(errno.EROFS), DISK_HINTS[errno.EROFS]
            raise UsageError(f"{path}: cannot be written: {problem}", hint=hint)
        raise UsageError(f"{path}: cannot be written: {there} is not a folder that you may write to", hint=hint)


def _check_owner(final: Path) -> None:
    """Check that this user may replace what exists, which in folders such as /tmp only its owner may."""
    state, user = final.parent.stat(), os.geteuid()
    if state.st_mode & stat.S_ISVTX and user not in (0, state.st_uid, final.lstat().st_uid):
        problem = f"belongs to another user, and {final.parent} lets only that user replace it"
        raise OutputExistsError(f"{final}: {problem}", hint=_ELSEWHERE)


def _is_mount_point(path: Path) -> bool:
    """Return whether a path is a mount point; ``os.path.ismount`` misses a folder mounted within its file system."""
    name = os.fsencode(Path(os.path.realpath(path.parent), path.name))
    for character in b"\\ \t\n":  # the backslash first, since it marks the others
        name = name.replace(bytes([character]), b"\\%03o" % character)
    try:
        mounts = _MOUNTS.read_bytes().splitlines()
    except OSError:  # another system, or one that hides them
        mounts = []
    return os.path.ismount(path) or any(line.split(b" ")[4] == name for line in mounts)


def _hint_to_replace(final: Path, inputs: Iterable[Path]) -> str:
    """Return a hint that names ``--force`` only where it would not be refused."""
    try:
        check_output(final, True, inputs)
    except (AdaptkitError, OSError):
        return _ELSEWHERE
    return f"{_ELSEWHERE}, or replace it with --force"


def _check_replaceable(final: Path) -> None:
    if is_empty_folder(final):
        if final.samefile("."):  # its shell would be left in a folder that is gone
            raise UsageError(f"{final}: is the current folder", hint="change to another folder, or choose another -o")
        return
    if final.is_symlink() or not (final / MANIFEST_NAME).is_file():
        raise OutputExistsError(f"{final}: adaptkit did not make this, so --force does not replace it", hint=_ASIDE)
    try:
        manifest = require_manifest(final)
    except IntegrityError as error:
        problem = "cannot tell which files adaptkit made, so --force does not replace it"
        raise OutputExistsError(f"{final}: {problem}: {error}", hint=_ASIDE) from error
    others = sorted(present_names(final) - {record.path for record in manifest.files})
    if others:
        problem = f"holds files that adaptkit did not make, so --force does not replace it: {first_few(others)}"
        raise OutputExistsError(f"{final}: {problem}", hint=f"move them elsewhere, or {_ELSEWHERE}")


def lock_output(path: Path, final: Path) -> int:
    """Lock a journal without waiting, and make it if there is none, to keep two processes from writing one output.

    Returns:
        A file descriptor, which holds the lock until it is closed.
    """
    with disk_errors(path):  # open for writing: network file systems lock no other file exclusively
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
            raise ConflictError(
                f"{final}: another process has just finished writing it", hint="use it, or choose another -o"
            )
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ConflictError(f"{final}: another process is writing it", hint="wait for it to end") from error
        raise UsageError(
            f"{final}: files cannot be locked on its disk ({error.strerror}), so two runs that write it at once would "
            "not notice each other",
            hint="choose an -o on another disk, or enable file locks (flock) on this one",
        ) from error
    except ConflictError:
        os.close(handle)
        raise
    return handle


def take_permissions(folder: Path, final: Path, added: int = 0) -> None:
    """Give an output the group and the permissions of the empty folder that it will replace, if there is one.

    ``added`` are further permissions, for the time of the work.
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

    With ``force`` it may replace an existing output that adaptkit made, otherwise only an empty folder.

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


def is_marker(path: Path) -> bool:
    """Return whether a file identifies its folder as made by adaptkit: a manifest or a journal."""
    return path.name in (MANIFEST_NAME, JOURNAL_NAME)


def clear(folder: Path, but: str = "") -> None:
    """Empty a folder except for one file; delete the identifying files last, in case the process is killed midway."""
    for old in sorted((path for path in folder.iterdir() if path.name != but), key=is_marker):
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def clear_all_but(folder: Path, keep: Collection[str]) -> None:
    """Delete all files except those at the given relative paths, and then empty subfolders."""
    for path in sorted(folder.rglob("*"), reverse=True):  # contents sort before their folder
        if path.is_symlink() or not path.is_dir():
            if path.relative_to(folder).as_posix() not in keep:
                path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()


def remove(folder: Path) -> None:
    """Delete a folder that adaptkit made."""
    clear(folder)
    folder.rmdir()


def is_replaced_output(folder: Path) -> bool:
    """Return whether this is a replaced output, or an empty folder left by an interrupted deletion of one."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / MANIFEST_NAME).is_file() or not any(folder.iterdir())
