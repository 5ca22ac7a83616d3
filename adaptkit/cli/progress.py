"""Progress bars on stderr if it is a terminal, and the notes between them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from adaptkit.cli.output import plain

if TYPE_CHECKING:
    from rich.progress import Progress

    from adaptkit.training.report import StepProgress


class Bar:
    """A bar, shown from its start or first update until all is done; nothing if stderr is not a terminal.

    Args:
        label: what is happening.
        hidden: show nothing.
        columns: what is shown between the bar and the time left: names of rich's columns, or formats of fields.
        quiet: of the notes, print only warnings.
    """

    def __init__(self, label: str, hidden: bool, columns: Sequence[str], quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None
        if hidden or not sys.stderr.isatty():
            return
        from rich import progress
        from rich.console import Console

        name = progress.TextColumn("{task.description}", markup=False)  # a path may contain brackets
        shown = [progress.TextColumn(column) if "{" in column else getattr(progress, column)() for column in columns]
        every = (name, progress.BarColumn(), *shown, progress.TimeRemainingColumn())
        self._bar = progress.Progress(*every, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(label, total=None)

    def start(self, label: str) -> bool:
        """Start again, for other work; return whether the bar is shown."""
        if self._bar is None:
            return False
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(label, total=None)
        self._bar.start()
        return True

    def update(self, done: int, total: int, **fields: Any) -> None:
        """Show how much is done, and the fields of ``columns``."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, **fields)
            self._bar.start()
            if done >= total:  # rich shows only one bar at a time
                self._bar.stop()

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    def print(self, text: str) -> None:
        """Print a line on stderr, above the bar, with its control characters escaped."""
        if self._bar is not None:
            self._bar.console.print(plain(text), markup=False, highlight=False, soft_wrap=True)
        else:
            print(plain(text), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line as ``print`` does; if quiet, only warnings."""
        if not self._quiet or text.startswith("warning"):
            self.print(text)


def byte_progress(label: str, hidden: bool = False) -> AbstractContextManager[Callable[[int, int], None]]:
    """Show a bar with bytes, rate and time left during the block.

    Args:
        label: what is happening.
        hidden: show nothing.

    Yields:
        A function to call with (bytes done, total bytes).
    """
    return _updated(label, hidden, ("DownloadColumn", "TransferSpeedColumn"))


def count_progress(label: str, hidden: bool = False) -> AbstractContextManager[Callable[[int, int], None]]:
    """Show a bar as ``byte_progress`` does, with a count and time left.

    Args:
        label: what is happening.
        hidden: show nothing.

    Yields:
        A function to call with (items done, total items).
    """
    return _updated(label, hidden, ("MofNCompleteColumn",))


@contextmanager
def _updated(label: str, hidden: bool, columns: Sequence[str]) -> Iterator[Callable[[int, int], None]]:
    bar = Bar(label, hidden, columns)
    try:
        yield bar.update
    finally:
        bar.stop()


@contextmanager
def training_progress(
    hidden: bool, quiet: bool
) -> Iterator[tuple[Callable[["StepProgress"], None], Callable[[str], None]]]:
    """Show a training run's step, loss, tokens per second and time left during the block.

    Args:
        hidden: show no bar.
        quiet: of the notes, print only warnings.

    Yields:
        Functions to call with the report of every step, and with one-line messages about everything else.
    """
    columns = ("MofNCompleteColumn", "loss {task.fields[loss]:.4f}", "{task.fields[speed]:.0f} tokens/s")
    bar = Bar("train", hidden, columns, quiet)

    def show(report: "StepProgress") -> None:
        bar.update(report.step, report.steps, loss=report.loss, speed=report.tokens_per_second)

    try:
        yield show, bar.note
    finally:
        bar.stop()
