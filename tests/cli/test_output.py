"""Paths of additional output files are checked before the work, and only files of the same kind are replaced."""

import os
import resource
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from adaptkit.checkpoint.writer import DiskError
from adaptkit.cli.output import check_place, check_report_file, in_turn, write_report, write_whole
from adaptkit.errors import UsageError


@dataclass
class Report:
    name: str
    number: int = 3
    later: str = "x"


@dataclass
class Other:
    name: str
    digits: int = 3


def is_ours(beginning):
    return beginning.startswith(b"ours")


def test_only_own_or_empty_files_are_replaced(tmp_path):
    path = tmp_path / "file"
    check_place(path, "--file", "page", is_ours)
    for content in (b"", b"ours\xff"):
        path.write_bytes(content)
        check_place(path, "--file", "page", is_ours)
    path.write_bytes(b"theirs")
    with pytest.raises(UsageError, match=r"--file .*file: already exists, and is not a page"):
        check_place(path, "--file", "page", is_ours)
    check_place(path, "--file")  # to be appended to


def test_a_report_is_distinguished_from_other_documents(tmp_path):
    path = tmp_path / "report.json"
    write_report(Report("one"), path)
    check_report_file(path, Report)
    for content in ('{"name": "one", "number": 3}', '{\n  "name": "one",\n  "version": 1\n}', "[]", "name\n"):
        path.write_text(content)
        with pytest.raises(UsageError, match="is not a report of this command"):
            check_report_file(path, Report)
    write_report(Other("one"), path)
    with pytest.raises(UsageError, match="is not a report of this command"):
        check_report_file(path, Report)


def test_unwritable_paths_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "absent" / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UsageError, match="cannot write a file there"):
            check_place(place, "--file", "page", is_ours)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for place in (tmp_path / "file", tmp_path / "new"):
        with pytest.raises(UsageError, match="cannot write a file there"):
            check_place(place, "--file", "page", is_ours)


def test_pipes_are_written_to_even_in_unwritable_folders(tmp_path, monkeypatch):
    """Only root may create files in the folder of a shell's pipes."""
    reading, writing = os.pipe()
    try:
        for place in (Path(f"/dev/fd/{writing}"), Path(os.devnull)):
            monkeypatch.setattr(os, "access", lambda path, mode, place=place: Path(path) == place)
            check_place(place, "--file", "page", is_ours)
            check_place(place, "--file")
        os.mkfifo(tmp_path / "pipe")
        monkeypatch.undo()
        check_place(tmp_path / "pipe", "--file", "page", is_ours)
        reader = threading.Thread(target=(tmp_path / "pipe").read_bytes)
        reader.start()
        write_whole(tmp_path / "pipe", "text")
        reader.join()
        assert (tmp_path / "pipe").is_fifo()
    finally:
        os.close(reading)
        os.close(writing)


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    (tmp_path / "report").write_text("old")
    (tmp_path / "link").symlink_to("report")
    (tmp_path / "mine.partial").write_text("mine")
    write_whole(tmp_path / "link", "new")
    assert ((tmp_path / "report").read_text(), (tmp_path / "link").is_symlink()) == ("new", True)
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(DiskError, match="cannot be written: File too large") as caught:
            write_whole(tmp_path / "report", "newer" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "ulimit -f" in caught.value.hint
    names = ("s-10:30.jsonl", "a\\b", "two\nlines", "mine")
    for name in names:
        write_whole(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    assert (tmp_path / "report").read_text() == "new"
    assert (tmp_path / "mine.partial").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"report", "link", "mine.partial", *names}
    for path, why in ((Path("/dev/full"), "No space left"), (tmp_path, "Is a directory")):
        with pytest.raises(DiskError, match=why):
            write_whole(path, "page")


def test_all_tasks_run_in_turn_and_a_failure_is_raised_afterwards():
    done = []

    def fail():
        raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        in_turn(lambda: done.append(1), fail, lambda: done.append(2))
    assert done == [1, 2]
