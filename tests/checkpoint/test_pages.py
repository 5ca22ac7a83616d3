"""Released pages are read from their file again, and only unmodified pages of files are released."""

import sys
from pathlib import Path

import pytest
import torch

from adaptkit.checkpoint.hashing import fingerprint, fingerprint_in_pieces
from adaptkit.checkpoint.reader import Checkpoint, MappedCheckpoint
from adaptkit.numerics.tensors import as_tensor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are released only on Linux")


def resident(address):
    """Return the resident KiB of the mapping that contains an address."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key = line.split()[0]
        if not key.endswith(":"):
            start, end = (int(part, 16) for part in key.split("-"))
            inside = start <= address < end
        elif inside and key == "Rss:":
            total += int(line.split()[1])
    return total


@pytest.fixture
def checkpoint(tmp_path):
    from safetensors.torch import save_file

    values = torch.arange(2**20, dtype=torch.int32)
    save_file({"first": values, "second": -values}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_released_pages_of_a_mapped_tensor_are_read_again(checkpoint):
    mapped = MappedCheckpoint(checkpoint)
    tensor = as_tensor(mapped.read("first"))
    total = int(tensor.sum())
    held = resident(tensor.data_ptr())
    mapped.release_pages(tensor)
    assert resident(tensor.data_ptr()) < held - 4000
    assert int(tensor.sum()) == total == 2**19 * (2**20 - 1)
    assert torch.equal(tensor, torch.arange(2**20, dtype=torch.int32))


def test_hashing_a_mapped_tensor_does_not_map_its_pages(checkpoint):
    mapped = MappedCheckpoint(checkpoint)
    tensor = as_tensor(mapped.read("first"))
    held = resident(tensor.data_ptr())
    found = fingerprint_in_pieces(mapped, "first")
    assert resident(tensor.data_ptr()) == held < 4000
    assert found == fingerprint(tensor.numpy())


@pytest.mark.parametrize(("given", "beside"), [("first", "second"), ("second", "first")])
def test_an_adjacent_tensor_keeps_its_modified_values(given, beside, checkpoint):
    """The two tensors share a page, which was written to."""
    mapped = MappedCheckpoint(checkpoint)
    tensor, other = as_tensor(mapped.read(given)), as_tensor(mapped.read(beside))
    assert abs(tensor.data_ptr() - other.data_ptr()) == tensor.nbytes
    other[0], other[-1] = 7, 8
    mapped.release_pages(tensor)
    assert (int(other[0]), int(other[-1])) == (7, 8)


@pytest.mark.parametrize("opened", [Checkpoint, MappedCheckpoint])
def test_a_tensor_that_is_not_mapped_from_a_file_stays(opened, checkpoint):
    files = opened(checkpoint)
    files.read("first")
    own = torch.ones(2**20, dtype=torch.int32)
    files.release_pages(own)
    assert int(own.sum()) == 2**20
    copy = as_tensor(files.read("first")).clone()
    files.release_pages(copy)
    assert torch.equal(copy, torch.arange(2**20, dtype=torch.int32))
