"""Delete folders that adaptkit made, in an order that leaves them recognizable as adaptkit's if it is interrupted."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from adaptkit.checkpoint.layout import JOURNAL_NAME
from adaptkit.checkpoint.manifest import MANIFEST_NAME
from adaptkit.checkpoint.writer import disk_errors


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


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Create an empty temporary folder, even if a killed run left one, and delete it when the block ends."""
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder that adaptkit made."""
    clear(folder)
    folder.rmdir()


def is_replaced_output(folder: Path) -> bool:
    """Return whether this is a replaced output, or an empty folder left by an interrupted deletion of one."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / MANIFEST_NAME).is_file() or not any(folder.iterdir())
