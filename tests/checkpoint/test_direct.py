"""Writes that bypass the page cache give the complete content, even if the disk cuts single writes short."""

import errno
import hashlib
import io
import itertools
import os
import random
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptkit.checkpoint import direct
from adaptkit.checkpoint.direct import DirectFile

PIECE = 8192
"""Small, so that a few kilobytes cover every code path."""
SIZES = [0, 1, 4095, 4096, 4097, PIECE - 1, PIECE, PIECE + 1, 4 * PIECE, 9 * PIECE + 17]


class CutShort(io.FileIO):
    """A file that cuts its first write short, as a disk may."""

    taken: int | None = 1000

    def write(self, data):
        taken, self.taken = self.taken, None
        return super().write(memoryview(data)[:taken])


class Refusing(io.FileIO):
    """A file whose third write fails."""

    writes = 0

    def write(self, data):
        self.writes += 1
        if self.writes == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write(data)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(direct, "_PIECE_BYTES", PIECE)


def written(file, content, cuts=(), nbytes=None):
    out = DirectFile(file, len(content) if nbytes is None else nbytes)
    edges = [0, *sorted(cut % (len(content) + 1) for cut in cuts), len(content)]
    scratch = bytearray(len(content))
    try:
        for start, end in itertools.pairwise(edges):
            scratch[: end - start] = content[start:end]
            out.append(memoryview(scratch)[: end - start])
            scratch[: end - start] = bytes(end - start)  # the caller may reuse its memory
        out.finish()
    finally:
        out.close()
    return out


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(SIZES), st.lists(st.integers(0, 1 << 20), max_size=5), st.integers(0, 99))
def test_any_size_in_any_portions_gives_the_same_file(tmp_path, size, cuts, seed):
    content = random.Random(seed).randbytes(size)
    out = written(io.FileIO(tmp_path / "x", "w"), content, cuts)
    assert (tmp_path / "x").read_bytes() == content
    assert (out.size, out.sha256()) == (size, hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("nbytes", [0, 100, 1 << 20])
def test_a_wrong_announced_length_changes_nothing(tmp_path, nbytes):
    content = os.urandom(5 * PIECE + 3)
    written(io.FileIO(tmp_path / "x", "w"), content, nbytes=nbytes)
    assert (tmp_path / "x").read_bytes() == content


@pytest.mark.parametrize("size", SIZES)
def test_a_write_that_is_cut_short_is_completed(tmp_path, size):
    content = os.urandom(size)
    out = written(CutShort(tmp_path / "x", "w"), content)
    assert (tmp_path / "x").read_bytes() == content
    assert out.sha256() == hashlib.sha256(content).hexdigest()


def test_a_disk_error_reaches_the_caller_and_leaves_no_thread(tmp_path):
    before = threading.active_count()
    with pytest.raises(OSError, match="Input/output error"):
        written(Refusing(tmp_path / "x", "w"), os.urandom(64 * PIECE), range(0, 64 * PIECE, 1000))
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs RWF_NOWAIT to see what is in the page cache")
def test_written_content_does_not_stay_in_the_page_cache(tmp_path):
    size = 64 * PIECE
    written(io.FileIO(tmp_path / "x", "w"), os.urandom(size))
    (tmp_path / "cached").write_bytes(bytes(size))
    with open(tmp_path / "x", "rb", buffering=0) as file, open(tmp_path / "cached", "rb", buffering=0) as cached:
        buffer = bytearray(4096)
        try:
            assert os.preadv(cached.fileno(), [buffer], 0, os.RWF_NOWAIT) == len(buffer)
        except OSError:
            pytest.skip("this file system does not support RWF_NOWAIT")
        with pytest.raises(BlockingIOError):  # only once: this makes the kernel read ahead
            os.preadv(file.fileno(), [buffer], size // 2, os.RWF_NOWAIT)
