"""Remove folders of adaptkit's so that, whenever that is cut off, what is left can still be told to be adaptkit's."""

import shutil
from pathlib import Path

from adaptkit.checkpoint.manifest import MANIFEST_NAME

JOURNAL_PATTERN = "adaptkit-journal*.jsonl"


def marks(path: Path) -> bool:
    """Whether a file says that its folder is adaptkit's work."""
    return path.name == MANIFEST_NAME or path.match(JOURNAL_PATTERN)


def clear(folder: Path, but: str = "") -> None:
    """Empty a folder but for one file; what says whose it is goes last, for a kill may come between."""
    for old in sorted((path for path in folder.iterdir() if path.name != but), key=marks):
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def remove(folder: Path) -> None:
    """Remove a folder of adaptkit's."""
    clear(folder)
    folder.rmdir()


def is_aside(folder: Path) -> bool:
    """Whether this is an output that was put aside, or what is left of one whose removal was cut off."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / MANIFEST_NAME).is_file() or not any(folder.iterdir())
