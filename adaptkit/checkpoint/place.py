"""Check where an output may be written, and whether what exists there may be replaced."""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from adaptkit.checkpoint._clearing import is_replaced_output
from adaptkit.checkpoint.integrity import present_names
from adaptkit.checkpoint.manifest import MANIFEST_NAME, require_manifest
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
        OutputExistsError: it exists, and ``force`` is not given or it holds files that adaptkit did not make; or only
            its owner may replace it.
        ConflictError: a foreign folder is where the old output would be kept.
        UsageError: the name is reserved for unfinished work, too long, or empty; the path cannot be followed, or its
            folder not be written; a folder that will be renamed is a mount point; or the output would overwrite,
            contain, or be inside an input, or be inside an artifact.
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
        raise UsageError(
            f"{final}: names that end in {_PARTIAL} or {_REPLACED} are reserved for unfinished work",
            hint=_ELSEWHERE,
        )
    if os.path.lexists(aside) and not is_replaced_output(aside):
        raise ConflictError(
            f"{aside}: is in the way, and adaptkit did not make it", hint="move it, or choose another -o"
        )
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
    """Refuse to write into an artifact, which would not match its manifest any more.

    Args:
        folder: where something will be written; need not exist.
        what: subject and verb of the message, such as "out: is".
        option: the option that names it, for the hint.

    Raises:
        UsageError: the folder is an artifact or inside one.
    """
    whole = Path(os.path.realpath(folder))
    for path in (whole, *whole.parents):
        if os.path.isfile(path / MANIFEST_NAME):
            raise UsageError(
                f"{what} inside the artifact {path}, which would no longer match its manifest",
                hint=f"choose another {option}",
            )


def require_writable_parent(path: Path, hint: str) -> None:
    """Check that something can be made at a path, whose parent folders may be missing.

    Args:
        path: of the file or folder.
        hint: of the error.

    Raises:
        UsageError: names the folder that cannot be written.
    """
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
        raise OutputExistsError(
            f"{final}: belongs to another user, and {final.parent} lets only that user replace it", hint=_ELSEWHERE
        )


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
        raise OutputExistsError(
            f"{final}: cannot tell which files adaptkit made, so --force does not replace it: {error}",
            hint=_ASIDE,
        ) from error
    others = sorted(present_names(final) - {record.path for record in manifest.files})
    if others:
        raise OutputExistsError(
            f"{final}: holds files that adaptkit did not make, so --force does not replace it: {first_few(others)}",
            hint="move them elsewhere, or choose another -o",
        )
