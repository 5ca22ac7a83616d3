"""Undo records are read back in order; truncated and malformed ones are refused."""

import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from undo_frames import frames

from adaptkit.checkpoint import undo
from adaptkit.errors import IntegrityError

RESIDUALS = st.lists(
    st.one_of(st.integers(-3, 3), st.sampled_from([-129, -128, -127, 126, 127, 128]), st.integers(-(2**40), 2**40)),
    max_size=60,
)
FRAMES = st.lists(st.tuples(st.integers(1, 2**32 - 1), RESIDUALS), max_size=5)


@given(FRAMES, st.integers(0, 5))
def test_frames_are_read_back_in_order(values, more):
    record = undo.as_bytes(b"".join(undo.pack_frame(rows, np.array(v, np.int64)) for rows, v in values))
    assert record.dtype == np.uint8
    found = [(rows, undo.unpack(stream, len(v) + more).tolist()) for (rows, stream), (_, v) in
             zip(frames(record), values, strict=True)]  # fmt: skip
    assert found == values


def test_the_layout_is_the_documented_one():
    streams = [undo.residual.encode(np.array(v)) for v in ([0, 1], [5, -700])]
    record = undo.as_bytes(undo.pack_frame(3, np.array([0, 1])) + undo.pack_frame(4, np.array([5, -700])))
    expected = b"".join(struct.pack("<II", rows, len(s)) + s for rows, s in zip((3, 4), streams, strict=True))
    assert record.tobytes() == expected


@given(FRAMES.filter(bool), st.data())
def test_a_record_that_is_truncated_inside_a_frame_is_refused(values, data):
    record = undo.as_bytes(b"".join(undo.pack_frame(rows, np.array(v, np.int64)) for rows, v in values))
    whole = {0}
    for _, stream in frames(record):
        whole.add(max(whole) + 8 + stream.size)
    cut = data.draw(st.integers(0, record.size - 1).filter(lambda n: n not in whole))
    with pytest.raises(IntegrityError, match="not an undo record"):
        list(frames(record[:cut]))


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_or_read_as_frames_within_them(content):
    record = undo.as_bytes(content)
    try:
        found = list(frames(record))
    except IntegrityError:
        return
    assert sum(8 + stream.size for _, stream in found) == len(content)
    for _, stream in found:
        with contextlib.suppress(IntegrityError):
            assert undo.unpack(stream, 100).size <= 100


@given(RESIDUALS.filter(bool))
def test_a_residual_longer_than_the_weight_is_refused(values):
    ((_, stream),) = frames(undo.as_bytes(undo.pack_frame(1, np.array(values, np.int64))))
    with pytest.raises(IntegrityError, match="not a residual"):
        undo.unpack(stream, len(values) - 1)


def test_small_residuals_take_about_two_bits_each():
    residual = np.random.default_rng(0).integers(-1, 2, 20_000)
    assert len(undo.pack_frame(1, residual)) * 8 < 2.05 * residual.size


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}', b"[1]", b"[null]", "[\xff]".encode("latin-1")])
def test_a_damaged_list_of_files_is_refused(content):
    with pytest.raises(IntegrityError, match="list of files is damaged"):
        undo.read_added(undo.as_bytes(content))
