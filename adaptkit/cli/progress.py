"""Progress bars on stderr, when it is a terminal."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Rich

    from adaptkit.training.report import StepReport


Told = AbstractContextManager[Callable[[int, int], None]]


def byte_progress(label: str, hidden: bool = False) -> Told:
    """Show bytes, rate and time left while the block runs, from when there are any until all are done.

    Args:
        label: what is happening.
        hidden: show nothing.

    Yields:
        A function that is told how many bytes are done, of how many.
    """
    return _bar(label, ("DownloadColumn", "TransferSpeedColumn"), hidden)


def count_progress(label: str, hidden: bool = False) -> Told:
    """Show how many of some things are done, and the time left, as ``byte_progress`` does.

    Args:
        label: what is happening.
        hidden: show nothing.

    Yields:
        A function that is told how many are done, of how many.
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
        bar.start()  # not before there is something to show, nor for longer: two bars cannot live at once
        bar.update(task, completed=done, total=total)
        if done == total:
            bar.stop()

    try:
        yield show
    finally:
        bar.stop()


@dataclass(frozen=True)
class TrainingProgress:
    """Where a training run is shown.

    Attributes:
        step: told of every step.
        note: told of everything else, in a line for people.
    """

    step: Callable[["StepReport"], None]
    note: Callable[[str], None]


@contextmanager
def training_progress(hidden: bool, quiet: bool) -> Iterator[TrainingProgress]:
    """Show step, loss, tokens per second and time left of a training run while the block runs; notes stay.

    Args:
        hidden: show no progress.
        quiet: show no notes either, but for warnings.
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
        show(text)


class StepBar:
    """A bar for one thing after another, on a terminal; elsewhere none.

    Args:
        hidden: show none.
    """

    def __init__(self, hidden: bool) -> None:
        self._bar: Rich | None = None
        if hidden or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)

    def start(self, label: str) -> bool:
        """Begin something; returns whether it is shown."""
        if self._bar is None:
            return False
        self._bar.add_task(label, total=None)
        self._bar.start()
        return True

    def update(self, done: int, total: int) -> None:
        """Show how much of it is done."""
        if self._bar is not None and self._bar.tasks:
            self._bar.update(self._bar.task_ids[-1], completed=done, total=total)

    def stop(self) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.stop()
            for task in self._bar.task_ids:
                self._bar.remove_task(task)

    def print(self, text: str) -> None:
        """A line on stderr, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def step_bar(hidden: bool) -> Iterator[StepBar]:
    """A ``StepBar`` that is taken away when the block ends, however it does."""
    bar = StepBar(hidden)
    try:
        yield bar
    finally:
        bar.stop()
