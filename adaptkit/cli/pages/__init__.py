"""Pages for a browser, one module a command: a report in, one self-contained HTML document out."""

from pathlib import Path

from adaptkit.cli.figures import require_matplotlib
from adaptkit.cli.html import DOCTYPE
from adaptkit.errors import UsageError


def prepare(path: Path | None, pictures: bool = True) -> None:
    """Ask before hours of work whether the page about it can be drawn and written.

    Args:
        path: of the page; None if there will be none.
        pictures: whether it has some.

    Raises:
        UsageError: matplotlib is missing, there is no folder to write to, or there is a file that is no page.
    """
    if path is None:
        return
    if pictures:
        require_matplotlib()
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            f"{path}: no page can be written there", hint="give the name of a file in a folder that exists"
        )
    if path.is_file() and not _is_page(path):
        raise UsageError(f"{path}: is there already, and is no page", hint="choose another --html")


def _is_page(path: Path) -> bool:
    """Whether a file may be replaced by a page: it is one, or empty."""
    with path.open("rb") as file:
        start = file.read(len(DOCTYPE)).decode(errors="replace")
    return start in ("", DOCTYPE)
