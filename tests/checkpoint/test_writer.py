"""Files are written sequentially as safetensors would write them, with correct digests."""

import hashlib
import itertools
import os
import threading
import time
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint import writer
from adaptkit.checkpoint.header import read_header
from adaptkit.checkpoint.manifest import FileRecord
from adaptkit.checkpoint.writer import DiskError, TensorWriter, copy_file, replace_file, replaced_name, write_file
from adaptkit.errors import CheckpointError, UnsafeInputError
from adaptkit.numerics.spec import TensorSpec
from adaptkit.numerics.tensors import as_array

SPECS = [TensorSpec("b", "F32", (6, 3)), TensorSpec("a", "BF16", (5,)), TensorSpec("none", "F16", (0, 2))]
TENSORS = {
    "b": torch.arange(18.0).view(6, 3),
    "a": torch.arange(5.0).bfloat16(),
    "none": torch.empty(0, 2, dtype=torch.float16),
}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 5), max_size=5))
def test_pieces_of_any_size_give_the_same_file(tmp_path, cuts):
    edges = sorted({0, 6, *cuts})
    with TensorWriter(tmp_path, "x.safetensors", SPECS) as writer:
        for start, end in itertools.pairwise(edges):
            writer.write("b", as_array(TENSORS["b"][start:end]))
        writer.write("a", as_array(TENSORS["a"]))
        writer.write("none", as_array(TENSORS["none"]))
    content = (tmp_path / "x.safetensors").read_bytes()
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert writer.record == FileRecord("x.safetensors", len(content), hashlib.sha256(content).hexdigest())
    for record in writer.tensors:
        raw = TENSORS[record.name].contiguous().view(torch.uint8).numpy().tobytes()
        assert record.xxh3_128 == xxhash.xxh3_128_hexdigest(raw)
        assert (record.file, record.shape) == ("x.safetensors", tuple(TENSORS[record.name].shape))


def test_a_given_header_is_written_unchanged(tmp_path):
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt", "made by": "another tool"})
    header = read_header(tmp_path / "theirs.safetensors")
    specs = [spec for spec, _ in header.tensors]
    with TensorWriter(tmp_path, "ours.safetensors", specs, header.raw) as writer:
        for spec in specs:
            writer.write(spec.name, as_array(TENSORS[spec.name]))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_concurrent_replacements_of_a_file_always_leave_a_whole_one(tmp_path):
    path, contents, seen = tmp_path / "x.json", [bytes([number]) * (200_000 + number) for number in range(4)], []

    def replace(content):
        for _ in range(40):
            replace_file(path, content)
            seen.append(path.read_bytes())

    threads = [threading.Thread(target=replace, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 160
    assert set(seen) <= set(contents)
    assert list(tmp_path.iterdir()) == [path]


def test_old_partial_files_of_killed_processes_are_removed_and_no_others(tmp_path):
    """Another machine, whose process numbers are unrelated, may be writing recent ones."""
    names, others = (
        [f".x.json.{process}.7.partial" for process in (5, 6)],
        [".x.json.notes.partial", ".y.json.5.7.partial"],
    )
    for name in [*names, *others]:
        (tmp_path / name).write_text("half")
    for name in [names[0], *others]:
        os.utime(tmp_path / name, (time.time() - 4000, time.time() - 4000))
    replace_file(tmp_path / "x.json", b"{}")
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", *names[1:], *others}
    assert {replaced_name(name) for name in names} == {replaced_name(".x.json.partial")} == {"x.json"}
    assert replaced_name("x.json") == "x.json"


@pytest.mark.parametrize(
    ("writes", "complaint"),
    [
        ([("a", 5)], "out of turn"),
        ([("b", 7)], "longer than"),
        ([("b", 3), ("b", 4)], "longer than"),
        ([("b", 6)], "'a' was not written"),
        ([], "'b' was not written"),
    ],
)
def test_writes_that_do_not_match_the_specs_are_errors(tmp_path, writes, complaint):
    specs = [TensorSpec("b", "F32", (6,)), TensorSpec("a", "F32", (5,))]

    def write():
        with TensorWriter(tmp_path, "x.safetensors", specs) as writer:
            for name, count in writes:
                writer.write(name, torch.zeros(count))

    with pytest.raises(ValueError, match=complaint):
        write()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_reported_with_a_hint_and_leaves_no_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "resolve_inside", lambda folder, name: Path("/dev/full"))
    before = threading.active_count()
    with pytest.raises(DiskError, match=r"full: cannot write") as caught:
        write_file(tmp_path, "x.json", b"x" * 100)
    assert "free some space" in caught.value.hint
    specs = [TensorSpec("t", "F32", (1 << 16,))]
    with (
        pytest.raises(DiskError, match=r"full: cannot write"),
        TensorWriter(tmp_path, "x.safetensors", specs) as w,
    ):
        w.write("t", torch.zeros(1 << 16))
    with pytest.raises(DiskError), TensorWriter(tmp_path, "x.safetensors", SPECS, bytes(16 << 20)):
        pytest.fail("it has been opened")  # full before the first tensor
    assert threading.active_count() == before


def test_an_unreadable_source_is_not_reported_as_a_copy_that_cannot_be_written(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(CheckpointError, match=r"/source: cannot be read: Is a directory"):
        copy_file(tmp_path / "source", tmp_path, "copy")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "folder/x", ""])
def test_nothing_is_written_outside_of_the_folder(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "folder").symlink_to(tmp_path)
    for write in (
        lambda: write_file(tmp_path / "in", name, b"x"),
        lambda: copy_file(Path(__file__), tmp_path / "in", name),
        lambda: TensorWriter(tmp_path / "in", name, []),
    ):
        with pytest.raises(UnsafeInputError):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
