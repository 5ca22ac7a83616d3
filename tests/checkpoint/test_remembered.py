"""A cached answer is read back for its question only; damaged and missing files are ignored."""

import os

import pytest

from adaptkit.checkpoint.remembered import CachedAnswer


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


def test_a_folder_pipe_or_link_at_the_path_is_not_an_answer(cache, tmp_path):
    """A pipe does not block, and a link is not followed."""
    for make in (lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to(tmp_path)):
        question = CachedAnswer(str(make))
        question._path.parent.mkdir(parents=True, exist_ok=True)
        make(question._path)
        again = CachedAnswer(str(make))
        assert again.read() is None
        again.keep({"a": 1})
        assert again.read() in (None, {"a": 1})
    assert list(tmp_path.iterdir()) == [cache]


def test_answers_are_stored_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("ADAPTKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    question = CachedAnswer("q")
    question.keep({"a": 1})
    assert question._path.parent == tmp_path / "adaptkit" / "answers"
