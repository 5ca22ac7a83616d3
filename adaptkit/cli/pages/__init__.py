"""HTML pages, one module per command: each converts a report to a self-contained document."""

from pathlib import Path

from adaptkit.cli.figures import require_matplotlib
from adaptkit.cli.html import DOCTYPE
from adaptkit.cli.output import check_place


def prepare(path: Path | None, pictures: bool = True) -> None:
    """Check, before a command's work, that its page can be drawn and written afterwards.

    Args:
        path: path of the page; None if no page is wanted.
        pictures: whether the page has figures.

    Raises:
        UsageError: matplotlib is missing, no file can be written there, or there is a file that is not such a page.
    """
    if path is None:
        return
    if pictures:
        require_matplotlib()
    check_place(path, "--html", "page of adaptkit", lambda start: start.startswith(DOCTYPE.encode()))
