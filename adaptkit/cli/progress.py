"""Progress bars on stderr if it is a terminal."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from adaptkit.cli.output import plain

if TYPE_CHECKING:
    from rich.progress import Progress as Rich

    from adaptkit.training.report import StepReport


ProgressContext = AbstractContextManager[Callable[[int, int], None]]


def byte_progress(label: str, hidden: bool = False) -> ProgressContext:
    """Show a bar with bytes, rate and time left, from the first update in the block until all bytes are done.

    Args:
        label: what is happening.
        hidden: show nothing.

    Yields:
        A function to call with (bytes done, total bytes).
    """
    return _bar(label, ("DownloadColumn", "TransferSpeedColumn"), hidden)


def count_progress(label: str, hidden: bool = False) -> ProgressContext:
    """Show a bar as ``byte_progress`` does, with a count and time left.

    Args:
        label: what is happening.
        hidden: show nothing.

    Yields:
        A function to call with (items done, total items).
    """
    return _bar(label, ("MofNCompleteColumn",), hidden)


@contextmanager
def _bar(label: str, figures: Sequence[str], hidden: bool) -> Iterator[Callable[[int, int], None]]:
    if hidden or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress
    from rich.console import Console

    shown = [getattr(progress, name)() for name in figures]
    columns = (progress.TextColumn(label), progress.BarColumn(), *shown, progress.TimeRemainingColumn())
    bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=None)

    def show(done: int, total: int) -> None:
        bar.start()  # started late and stopped early, since rich shows only one bar at a time
        bar.update(task, completed=done, total=total)
        if done == total:
            bar.stop()

    try:
        yield show
    finally:
        bar.stop()


@dataclass(frozen=True)
class TrainingProgress:
    """Callbacks that show a training run.

    Attributes:
        step: called with the report of every step.
        note: called with one-line messages about everything else.
    """

    step: Callable[["StepReport"], None]
    note: Callable[[str], None]


@contextmanager
def training_progress(hidden: bool, quiet: bool) -> Iterator[TrainingProgress]:
    """Show a training run's step, loss, tokens per second and time left during the block; notes stay on the terminal.

    Args:
        hidden: show no bar.
        quiet: of the notes, show only warnings.
    """
    if hidden or not sys.stderr.isatty():
        yield TrainingProgress(lambda report: None, partial(_note, quiet, partial(print, file=sys.stderr, flush=True)))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("train", total=None, loss=float("nan"), speed=0.0)

        def show(report: "StepReport") -> None:
            bar.update(
                task, completed=report.step, total=report.steps, loss=report.loss, speed=report.tokens_per_second
            )

        yield TrainingProgress(show, partial(_note, quiet, partial(console.print, markup=False, highlight=False)))


def _note(quiet: bool, show: Callable[[str], None], text: str) -> None:
    if not quiet or text.startswith("warning"):
        show(plain(text))


class StepBar:
    """A bar for a sequence of tasks; shown only on a terminal.

    Args:
        hidden: show no bar.
    """

    def __init__(self, hidden: bool) -> None:
        self._bar: Rich | None = None
        if hidden or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        name = TextColumn("{task.description}", markup=False)  # a path may contain brackets
        columns = (name, BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)

    def start(self, label: str) -> bool:
        """Start the bar of a task; return whether it is shown."""
        if self._bar is None:
            return False
        self._bar.add_task(label, total=None)
        self._bar.start()
        return True

    def update(self, done: int, total: int) -> None:
        """Show how much of the task is done."""
        if self._bar is not None and self._bar.tasks:
            self._bar.update(self._bar.task_ids[-1], completed=done, total=total)

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            for task in self._bar.task_ids:
                self._bar.remove_task(task)

    def print(self, text: str) -> None:
        """Print a line on stderr, above the bar, with its control characters escaped."""
        text = plain(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)
