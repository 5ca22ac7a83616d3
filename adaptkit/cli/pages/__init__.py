"""Pages for a browser, one module a command: a report in, one self-contained HTML document out."""

from pathlib import Path

from adaptkit.cli.figures import require_matplotlib
from adaptkit.cli.html import DOCTYPE
from adaptkit.cli.output import check_place


def prepare(path: Path | None, pictures: bool = True) -> None:
    """Ask before hours of work whether the page about it can be drawn and written.

    Args:
        path: of the page; None if there will be none.
        pictures: whether it has some.

    Raises:
        UsageError: matplotlib is missing, no file can be written there, or there is one that is no page.
    """
    if path is None:
        return
    if pictures:
        require_matplotlib()
    check_place(path, "--html", "page of adaptkit", lambda start: start.startswith(DOCTYPE.encode()))
