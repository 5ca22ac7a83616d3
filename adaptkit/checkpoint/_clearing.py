"""Remove folders of adaptkit's so that, whenever that is cut off, what is left can still be told to be adaptkit's."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from adaptkit.checkpoint.manifest import MANIFEST_NAME
from adaptkit.checkpoint.writer import disk_errors

JOURNAL_PATTERN = "adaptkit-journal*.jsonl"


def marks(path: Path) -> bool:
    """Whether a file says that its folder is adaptkit's work."""
    return path.name == MANIFEST_NAME or path.match(JOURNAL_PATTERN)


def clear(folder: Path, but: str = "") -> None:
    """Empty a folder but for one file; what says whose it is goes last, for a kill may come between."""
    for old in sorted((path for path in folder.iterdir() if path.name != but), key=marks):
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def clear_all_but(folder: Path, keep: Collection[str]) -> None:
    """Remove all files of a folder but those at the given paths in it, and what is empty then."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        if path.is_symlink() or not path.is_dir():
            if path.relative_to(folder).as_posix() not in keep:
                path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()


@contextmanager
def made_for_a_while(folder: Path) -> Iterator[Path]:
    """A folder that is empty when the block begins, whatever a killed run left in it, and gone however it ends."""
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a folder of adaptkit's."""
    clear(folder)
    folder.rmdir()


def is_aside(folder: Path) -> bool:
    """Whether this is an output that was put aside, or what is left of one whose removal was cut off."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / MANIFEST_NAME).is_file() or not any(folder.iterdir())
