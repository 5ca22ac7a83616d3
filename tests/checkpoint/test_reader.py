"""Tensors are read as by safetensors, and folders whose parts disagree are refused."""

import errno
import json
import os
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.layout import INDEX_NAME
from adaptkit.checkpoint.reader import Checkpoint, MappedCheckpoint, TensorFiles
from adaptkit.errors import DISK_HINTS, AdaptkitError, CheckpointError, IntegrityError, UnsafeInputError
from adaptkit.numerics.tensors import as_tensor


def same(one, two):
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


@pytest.fixture
def mixed(tmp_path):
    """Tensors of many types and shapes, and the folder that holds them."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "rows": torch.randn(37, 5, generator=generator),
        "half": torch.randn(4, 3, 2, generator=generator).half(),
        "brain": torch.randn(8, generator=generator).bfloat16(),
        "ints": torch.arange(11),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "truths": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "none wide": torch.empty(4, 0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tensors, tmp_path


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_tensors_and_their_pieces_are_those_written_with_safetensors(mixed, size):
    tensors, folder = mixed
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert same(as_tensor(checkpoint.read(name)), tensor), name
        starts = range(0, tensor.numel(), size)
        pieces = [as_tensor(checkpoint.read_flat(name, start, min(size, tensor.numel() - start))) for start in starts]
        assert same(torch.cat(pieces) if pieces else tensor.reshape(-1), tensor.reshape(-1)), name


def test_shards_are_read_like_a_single_file(llama, llama_sharded):
    whole, parts = Checkpoint(llama), Checkpoint(llama_sharded)
    assert len(parts.headers) == 3
    assert list(TensorFiles(llama_sharded, [LAST, FIRST]).headers) == [LAST, FIRST]  # in the order given
    expected = load_file(llama / "model.safetensors")
    assert set(whole.tensors) == set(parts.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(as_tensor(whole.read(name)), tensor)
        assert torch.equal(as_tensor(parts.read(name)), tensor)


NORM, FIRST, LAST = "model.norm.weight", "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
INDEXES = {
    "a tensor of no shard": (lambda m: m.update({"ghost.weight": FIRST}), r"ghost\.weight"),
    "an unlisted tensor": (lambda m: m.pop(NORM), r"model\.norm\.weight.* not in the index"),
    "another shard": (lambda m: m.update({NORM: FIRST if m[NORM] == LAST else LAST}), r"model\.norm\.weight"),
    "a shard outside": (lambda m: m.update(dict.fromkeys(m, f"../{FIRST}")), "is not a plain path inside its folder"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_does_not_match_the_shards_is_refused(llama_sharded, copy_of, tmp_path, name):
    folder = copy_of(llama_sharded)
    (tmp_path / FIRST).write_bytes((folder / FIRST).read_bytes())
    change, error = INDEXES[name]
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UnsafeInputError, match=error):
        Checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(llama_sharded, copy_of):
    folder = copy_of(llama_sharded)
    twice = next(iter(load_file(folder / FIRST)))
    save_file(load_file(folder / LAST) | {twice: load_file(folder / FIRST)[twice]}, folder / LAST)
    with pytest.raises(CheckpointError, match=twice.replace(".", r"\.")):
        Checkpoint(folder)


@pytest.mark.parametrize("kind", ["missing", "fifo", "folder", "linked folder", "pickle", "truncated"])
def test_a_shard_that_is_missing_or_invalid_is_refused_by_name(llama_sharded, copy_of, tmp_path, kind):
    folder = copy_of(llama_sharded)
    shard = folder / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    if kind == "fifo":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    elif kind == "linked folder":
        shard.symlink_to(tmp_path)
    elif kind == "pickle":
        torch.save({"a": torch.zeros(3)}, shard)
    elif kind == "truncated":
        shard.write_bytes(content[:-1])
    with pytest.raises(UnsafeInputError, match=r"model-00002-of-00003\.safetensors"):
        Checkpoint(folder)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(mixed):
    _, folder = mixed
    checkpoint = Checkpoint(folder)
    last = max(checkpoint.tensors.values(), key=lambda located: located.position + located.spec.nbytes)
    os.truncate(folder / "model.safetensors", last.position + last.spec.nbytes - 1)
    with pytest.raises(IntegrityError, match="ends inside tensor"):
        checkpoint.read(last.spec.name)


def test_a_file_that_cannot_be_opened_is_not_reported_as_damaged(mixed):
    """So that nobody downloads it again."""
    _, folder = mixed
    readers, limits = [Checkpoint(folder), MappedCheckpoint(folder)], resource.getrlimit(resource.RLIMIT_NOFILE)
    reads = [lambda: Checkpoint(folder), *(lambda reader=reader: reader.read("rows") for reader in readers)]
    raised = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        for read in reads:
            with pytest.raises(AdaptkitError) as caught:
                read()
            raised.append(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for error in raised:
        assert "Too many open files" in error.message
        assert error.hint == DISK_HINTS[errno.EMFILE]


def test_a_folder_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="contains no tensors"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="contains no tensors"):
        Checkpoint(tmp_path)


def test_state_changes_with_every_file_that_affects_the_output(llama_sharded, copy_of):
    folder = copy_of(llama_sharded)
    before = Checkpoint(folder).state()
    assert Checkpoint(folder).state() == before
    for name in ("config.json", "model-00003-of-00003.safetensors"):
        os.utime(folder / name, ns=(1, 1))
        after = Checkpoint(folder).state()
        assert after != before
        before = after
