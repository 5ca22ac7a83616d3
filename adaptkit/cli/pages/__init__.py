"""Pages for a browser, one module a command: a report in, one self-contained HTML document out."""

from pathlib import Path

from adaptkit.cli.figures import require_matplotlib
from adaptkit.errors import UsageError


def prepare(path: Path | None, pictures: bool = True) -> None:
    """Ask before hours of work whether the page about it can be drawn and written.

    Args:
        path: of the page; None if there will be none.
        pictures: whether it has some.

    Raises:
        UsageError: matplotlib is missing, or there is no folder to write to.
    """
    if path is None:
        return
    if pictures:
        require_matplotlib()
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            f"{path}: no page can be written there", hint="give the name of a file in a folder that exists"
        )


def write(path: Path, document: str) -> None:
    """Write a page.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        path.write_text(document, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path}: the page cannot be written: {error.strerror}", hint="choose another --html"
        ) from error
