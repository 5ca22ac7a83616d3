"""A cached answer is read back for its question only; damaged and missing files are ignored."""

import os
from pathlib import Path

import pytest

from adaptkit.hub._remembered import CachedAnswer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_answer_is_read_back_for_its_question_only(cache):
    assert CachedAnswer(["a", 1]).read() is None
    CachedAnswer(["a", 1]).keep({"answer": [1, 2.5, None]})
    assert CachedAnswer(["a", 1]).read() == {"answer": [1, 2.5, None]}
    assert CachedAnswer(["a", 2]).read() is None
    assert CachedAnswer({"x": 1, "y": 2})._path == CachedAnswer({"y": 2, "x": 1})._path


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": ', b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_ignored_and_replaced(cache, content):
    question = CachedAnswer("q")
    question.keep({"a": 1})
    question._path.write_bytes(content)
    assert question.read() is None
    question.keep({"a": 2})
    assert question.read() == {"a": 2}
    assert [path.name for path in question._path.parent.iterdir()] == [question._path.name]


def test_nothing_is_cached_without_a_usable_folder_or_a_question(cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in ("", str(tmp_path / "file"), "/proc/nowhere"):
        monkeypatch.setenv("ADAPTKIT_CACHE", place)
        CachedAnswer("q").keep({"a": 1})
        assert CachedAnswer("q").read() is None
    monkeypatch.setenv("ADAPTKIT_CACHE", str(cache))
    CachedAnswer(None).keep({"a": 1})
    assert CachedAnswer(None).read() is None
    assert not cache.exists()


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (Path.mkdir, None),
        (os.mkfifo, {"a": 1}),
        (lambda path: path.symlink_to(path.parent), None),
        (lambda path: path.symlink_to("nowhere"), None),
    ],
    ids=["folder", "pipe", "link to a folder", "dangling link"],
)
def test_a_folder_pipe_or_link_at_the_path_is_not_an_answer(cache, tmp_path, make, kept):
    """A pipe does not block, and an answer replaces it; the others stay."""
    path = CachedAnswer("q")._path
    path.parent.mkdir(parents=True)
    make(path)
    again = CachedAnswer("q")
    assert again.read() is None
    again.keep({"a": 1})
    assert again.read() == kept
    assert list(tmp_path.iterdir()) == [cache]
    assert list(path.parent.iterdir()) == [path]


def test_an_answer_replaces_a_link_and_not_the_file_that_it_points_to(cache, tmp_path):
    other = tmp_path / "mine.json"
    other.write_text('{"mine": 0}')
    path = CachedAnswer("q")._path
    path.parent.mkdir(parents=True)
    path.symlink_to(other)
    CachedAnswer("q").keep({"a": 1})
    assert other.read_text() == '{"mine": 0}'
    assert not path.is_symlink()
    assert CachedAnswer("q").read() == {"a": 1}


def test_answers_are_stored_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("ADAPTKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    question = CachedAnswer("q")
    question.keep({"a": 1})
    assert question._path.parent == tmp_path / "adaptkit" / "answers"
