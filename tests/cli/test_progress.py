"""A progress bar is shown only while work is unfinished, whatever it is called."""

import io

import pytest
from rich.progress import Progress

from adaptkit.cli.progress import StepBar, byte_progress, count_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def bars(monkeypatch):
    """The bars that are created during the test."""
    made, init = [], Progress.__init__

    def remember(self, *columns, **options):
        init(self, *columns, **options)
        made.append(self)

    monkeypatch.setattr(Progress, "__init__", remember)
    return made


@pytest.mark.parametrize("progress", [byte_progress, count_progress])
def test_a_bar_is_shown_from_the_first_report_until_the_work_is_complete(progress, bars, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    with progress("work") as tell:
        (bar,) = bars
        assert not bar.live.is_started
        for done, is_shown in ((0, True), (5, True), (10, False), (3, True)):
            tell(done, 10)
            assert bar.live.is_started is is_shown
            assert (bar.tasks[0].completed, bar.tasks[0].total) == (done, 10)
    assert not bar.live.is_started


@pytest.mark.parametrize("progress", [byte_progress, count_progress])
def test_no_bar_is_created_if_hidden_or_without_a_terminal(progress, bars, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    with progress("work", hidden=True) as tell:
        tell(1, 2)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with progress("work") as tell:
        tell(1, 2)
    assert bars == []


@pytest.mark.parametrize("path", ["data[/b]/rows.jsonl", "[red]/rows.jsonl", "{a}[/rows.jsonl"])
def test_a_name_that_looks_like_markup_is_shown_as_it_is(path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    bar = StepBar(hidden=False)
    assert bar.start(path)
    bar.update(1, 2)
    bar.stop()
    assert path in terminal.getvalue()
