"""Headers are those of safetensors; malformed and ambiguous ones are refused."""

import itertools
import json
import os
import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file

from adaptkit.checkpoint.header import (
    check_regular,
    read_header,
    write_header,
)
from adaptkit.documents import strict_json
from adaptkit.errors import CheckpointError
from adaptkit.numerics.spec import TensorSpec
from adaptkit.numerics.tensors import DTYPES


def raw(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, dtype: str = "U8", shape: str | None = None) -> str:
    return f'{{"dtype":"{dtype}","shape":{shape or [end - start]},"data_offsets":[{start},{end}]}}'


@given(
    st.dictionaries(
        st.text("abcxyz._0123456789-é", min_size=1, max_size=12),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_a_written_header_is_read_by_safetensors_and_by_read_header(tmp_path_factory, tensors):
    specs = [TensorSpec(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    header = write_header(specs)
    assert header == write_header(specs)
    assert len(header) % 8 == 0
    content = header + bytes(sum(spec.nbytes for spec in specs))
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    path.write_bytes(content)
    found = load_file(path)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in found.items()} == {
        spec.name: (DTYPES[spec.dtype], spec.shape) for spec in specs
    }
    positions = itertools.accumulate((spec.nbytes for spec in specs), initial=len(header))
    read = read_header(path)
    assert read.raw == header
    assert len(read.tensors) == len(specs)
    assert dict(read.tensors) == dict(zip(specs, positions, strict=False))


def test_tensors_in_a_header_of_safetensors_are_read_in_the_order_of_positions(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.zeros(5, dtype=torch.bfloat16), "c": torch.tensor(7)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "x.safetensors").read_bytes()
    header = read_header(tmp_path / "x.safetensors")
    assert content.startswith(header.raw)
    positions = [position for _, position in header.tensors]
    assert positions == sorted(positions)
    for spec, position in header.tensors:
        piece = torch.frombuffer(bytearray(content[position : position + spec.nbytes]), dtype=DTYPES[spec.dtype])
        assert torch.equal(piece.view(spec.shape), tensors[spec.name])


TEN = bytes(10)
DEEP = "[" * 5000 + "]" * 5000
HOSTILE = {
    "a list": raw("[]"),
    "a name twice": raw(f'{{"a":{entry(0, 5)},"a":{entry(5, 10)}}}', TEN),
    "a metadata key twice": raw(f'{{"__metadata__":{{"f":"1","f":"2"}},"a":{entry(0, 10)}}}', TEN),
    "NaN": raw('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,10]}}', TEN),
    "unsupported dtype": raw(f'{{"a":{entry(0, 10, "U16", "[5]")}}}', TEN),
    "trailing bytes": raw(f'{{"a":{entry(0, 10)}}}', TEN + b"PK\x05\x06" + bytes(18)),
    "hole": raw(f'{{"a":{entry(0, 4)},"b":{entry(6, 10)}}}', TEN),
    "backslash": raw(f'{{"a\\\\b":{entry(0, 10)}}}', TEN),
    "newline in a name": raw(f'{{"a\\n":{entry(0, 10)}}}', TEN),
    "right-to-left override": raw(f'{{"a\\u202eb":{entry(0, 10)}}}', TEN),
    "lone surrogate": raw(f'{{"a\\ud800":{entry(0, 10)}}}', TEN),
    "a pickle": b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.",
}
"""Besides those of ``bad_inputs``, with which whole commands run."""


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_malformed_file_is_refused_by_name(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(path)


def test_a_sound_file_of_the_same_layout_is_read(tmp_path):
    """Otherwise the test above could pass for the wrong reason."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(f'{{"__metadata__":{{"f":"1"}},"a":{entry(0, 4)},"b":{entry(4, 10)}}}', TEN))
    assert [spec.name for spec, _ in read_header(path).tensors] == ["a", "b"]


@given(
    st.lists(
        st.lists(st.sampled_from([0, 1, 2, 3, -1, -2, True, 2.0, 1 << 40, (1 << 64) + 1]), max_size=3), max_size=3
    ),
    st.integers(-1, 1),
)
@example([[0, 1 << 40, 1 << 40]], 0)
@example([[0, 1 << 63]], 0)
def test_a_header_that_is_accepted_is_accepted_by_safetensors_too(tmp_path_factory, shapes, change):
    specs = [TensorSpec(f"t{number}", "U8", tuple(shape)) for number, shape in enumerate(shapes)]
    nbytes = int(sum(spec.nbytes for spec in specs)) + change
    content = write_header(specs) + bytes(nbytes if 0 <= nbytes < 1000 else 0)
    path = tmp_path_factory.mktemp("ours") / "x.safetensors"
    path.write_bytes(content)
    try:
        found = [spec for spec, _ in read_header(path).tensors]
    except CheckpointError:
        return
    assert sorted(load(content)) == [spec.name for spec in found]
    assert found == specs


@pytest.mark.parametrize("kind", ["fifo", "folder", "absent", "dangling link"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    if kind == "fifo":
        os.mkfifo(path)  # opening it would block forever
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    for refuse in (check_regular, read_header):
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            refuse(path)


@pytest.mark.parametrize(
    "text",
    [b'{"a":1,"a":2}', b'{"a":{"b":1,"b":1}}', b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e999}', b"[1]", b"null", b"",
     b"{", b'{"a":1}x', b"\xff\xfe{}", DEEP.encode() * 20, b'{"a":' + b"1" * 5000 + b"}"],
    ids=range(13),
)  # fmt: skip
def test_malformed_or_ambiguous_json_is_refused(text):
    with pytest.raises(CheckpointError, match=r"^config\.json: "):
        strict_json(text, "config.json")


@given(st.dictionaries(st.text(), st.none() | st.integers(-9, 9) | st.text() | st.lists(st.text()), max_size=4))
def test_ordinary_json_is_read_unchanged(value):
    assert strict_json(json.dumps(value).encode(), "x") == value


@pytest.mark.parametrize(
    ("content", "error", "hint"),
    [
        (raw(f'{{"lm_head.weight":{entry(0, 128, "U32", "[4,8]")}}}', bytes(128)), "U32", "that it was made from"),
        (f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n".encode(),
         "a Git LFS pointer", "git lfs pull"),
    ],
    ids=["MLX", "Git LFS"],
)  # fmt: skip
def test_weights_of_mlx_and_git_lfs_pointers_are_refused_with_a_hint(tmp_path, content, error, hint):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=error) as caught:
        read_header(path)
    assert hint in caught.value.hint
