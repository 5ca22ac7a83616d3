"""A progress bar is shown only while work is unfinished, whatever it is called."""

import io

import pytest
from rich.progress import Progress

from adaptkit.cli.progress import Bar, byte_progress, count_progress, training_progress
from adaptkit.training.report import StepProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def bars(monkeypatch):
    """A function that makes stderr a terminal and returns the list of the bars created from then on."""
    made, init = [], Progress.__init__

    def remember(self, *columns, **options):
        init(self, *columns, **options)
        made.append(self)

    def start():  # in the test itself, since pytest replaces stderr before it
        monkeypatch.setattr(Progress, "__init__", remember)
        monkeypatch.setattr("sys.stderr", Terminal())
        monkeypatch.setenv("COLUMNS", "200")
        return made

    return start


@pytest.mark.parametrize("progress", [byte_progress, count_progress])
def test_a_bar_is_shown_from_the_first_report_until_the_work_is_complete(progress, bars):
    made = bars()
    with progress("work") as tell:
        (bar,) = made
        assert not bar.live.is_started
        for done, is_shown in ((0, True), (5, True), (10, False), (3, True)):
            tell(done, 10)
            assert bar.live.is_started is is_shown
            assert (bar.tasks[0].completed, bar.tasks[0].total) == (done, 10)
    assert not bar.live.is_started


def test_no_bar_is_created_if_hidden_or_without_a_terminal(bars, monkeypatch):
    made = bars()
    for hidden in (True, False):
        with byte_progress("work", hidden=hidden) as tell, training_progress(hidden, quiet=True) as (_, note):
            tell(1, 2)
            note("of no importance")
        monkeypatch.setattr("sys.stderr", io.StringIO())
    assert made == []


@pytest.mark.parametrize("path", ["data[/b]/rows.jsonl", "[red]/rows.jsonl", "{a}[/rows.jsonl"])
def test_a_name_that_looks_like_markup_is_shown_as_it_is(path, bars):
    made, bar = bars(), Bar("", False, ())
    assert bar.start(path)
    bar.update(1, 2)
    bar.print(f"note: {path}")
    bar.stop()
    shown = made[0].console.file.getvalue()
    assert shown.count(path) >= 2
    assert f"note: {path}\n" in shown


def test_a_training_run_shows_its_loss_and_speed_and_notes_above_the_bar(bars):
    made = bars()
    with training_progress(hidden=False, quiet=True) as (on_step, note):
        on_step(
            StepProgress(**dict.fromkeys(StepProgress.__dataclass_fields__, 0) | {"step": 1, "steps": 9, "loss": 2.5})
        )
        note("of no importance")
        note("warning: the disk is full")
        shown = made[0].console.file.getvalue()
    assert "loss 2.5000" in shown
    assert "1/9" in shown
    assert "warning: the disk is full\n" in shown
    assert "importance" not in shown
