"""Digests do not depend on the pieces in which a file is read."""

import hashlib
import itertools

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.checkpoint import hashing
from adaptkit.checkpoint.hashing import file_digests, file_sha256


@given(
    st.binary(max_size=200),
    st.lists(st.integers(0, 250), max_size=8),
    st.integers(1, 70),
)
def test_a_file_and_its_ranges_are_hashed_in_one_pass(tmp_path_factory, content, cuts, piece_bytes):
    """Ranges may exceed the file."""
    path = tmp_path_factory.mktemp("hashing") / "file"
    path.write_bytes(content)
    parts = [(start, end - start) for start, end in itertools.pairwise(sorted(cuts))][::2]
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "_PIECE_BYTES", piece_bytes)
        size, sha256, digests = file_digests(path, parts, told.append)
    assert size == sum(told) == len(content)
    assert sha256 == hashlib.sha256(content).hexdigest() == file_sha256(path)
    assert digests == [xxhash.xxh3_128_hexdigest(content[start : start + size]) for start, size in parts]


def test_a_large_file_is_read_in_pieces(tmp_path):
    content = bytes(range(256)) * 20_000
    (tmp_path / "file").write_bytes(content)
    told = []
    parts = [(8, 1 << 20), ((1 << 20) + 8, 3), ((1 << 20) + 11, len(content) - (1 << 20) - 11)]
    size, sha256, digests = file_digests(tmp_path / "file", parts, told.append)
    assert (size, sum(told), len(told)) == (len(content), len(content), 5)
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert digests == [xxhash.xxh3_128_hexdigest(content[start : start + size]) for start, size in parts]
