"""What is kept is what is read again, for this question alone, and a damaged or missing file is no answer."""

import os

import pytest

from adaptkit.checkpoint.remembered import CachedAnswer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_answer_belongs_to_its_question(cache):
    assert CachedAnswer(["a", 1]).read() is None
    CachedAnswer(["a", 1]).keep({"answer": [1, 2.5, None]})
    assert CachedAnswer(["a", 1]).read() == {"answer": [1, 2.5, None]}
    assert CachedAnswer(["a", 2]).read() is None
    assert CachedAnswer({"x": 1, "y": 2})._path == CachedAnswer({"y": 2, "x": 1})._path


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": ', b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_no_answer_and_is_replaced(cache, content):
    question = CachedAnswer("q")
    question.keep({"a": 1})
    question._path.write_bytes(content)
    assert question.read() is None
    question.keep({"a": 2})
    assert question.read() == {"a": 2}
    assert [path.name for path in question._path.parent.iterdir()] == [question._path.name]


def test_nothing_is_kept_where_it_must_not_or_cannot(cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in ("", str(tmp_path / "file"), "/proc/nowhere"):
        monkeypatch.setenv("ADAPTKIT_CACHE", place)
        CachedAnswer("q").keep({"a": 1})
        assert CachedAnswer("q").read() is None
    monkeypatch.setenv("ADAPTKIT_CACHE", str(cache))
    CachedAnswer(None).keep({"a": 1})
    assert CachedAnswer(None).read() is None
    assert not cache.exists()


def test_what_lies_in_its_place_is_left_alone(cache, tmp_path):
    """And is neither waited for, as a pipe would be, nor written through."""
    for make in (lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to(tmp_path)):
        question = CachedAnswer(str(make))
        question._path.parent.mkdir(parents=True, exist_ok=True)
        make(question._path)
        again = CachedAnswer(str(make))
        assert again.read() is None
        again.keep({"a": 1})
        assert again.read() in (None, {"a": 1})
    assert list(tmp_path.iterdir()) == [cache]


def test_it_lies_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("ADAPTKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    question = CachedAnswer("q")
    question.keep({"a": 1})
    assert question._path.parent == tmp_path / "adaptkit" / "answers"
