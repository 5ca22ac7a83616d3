"""Released pages are read from their file again, and only unmodified pages of files are released."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptkit.checkpoint import pages
from adaptkit.checkpoint.hashing import fingerprint, fingerprint_in_pieces
from adaptkit.checkpoint.reader import Checkpoint, MappedCheckpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are released only on Linux")

LOADED = """
from adaptkit.checkpoint.pages import _unchanged, release_kernel_compiler_pages

def resident():
    found, inside = 0, False
    for line in open("/proc/self/smaps"):
        inside = "llvmlite" in line if "-" in line.split()[0] else inside
        found += int(line.split()[1]) if inside and line.startswith("Rss:") else 0
    return found / 1000

if {given}:
    release_kernel_compiler_pages()  # before anything else has loaded it
import numpy as np
from adaptkit.compiled import jit, _machine
_machine()
before = resident()

@jit
def double(x):
    return 2 * x

assert double(2) == 4 and double(1.5) == 3.0
print(before, resident())
assert double(np.float32(2)) == 4
"""


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
    tensor = mapped.read("first")
    total = int(tensor.sum())
    held = resident(tensor.data_ptr())
    mapped.release_pages(tensor)
    assert resident(tensor.data_ptr()) < held - 4000
    assert int(tensor.sum()) == total == 2**19 * (2**20 - 1)
    assert torch.equal(tensor, torch.arange(2**20, dtype=torch.int32))


def test_hashing_a_mapped_tensor_does_not_map_its_pages(checkpoint):
    mapped = MappedCheckpoint(checkpoint)
    tensor = mapped.read("first")
    held = resident(tensor.data_ptr())
    found = fingerprint_in_pieces(mapped, "first")
    assert resident(tensor.data_ptr()) == held < 4000
    assert found == fingerprint(tensor)


@pytest.mark.parametrize(("given", "beside"), [("first", "second"), ("second", "first")])
def test_an_adjacent_tensor_keeps_its_modified_values(given, beside, checkpoint):
    """The two tensors share a page, which was written to."""
    mapped = MappedCheckpoint(checkpoint)
    tensor, other = mapped.read(given), mapped.read(beside)
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
    copy = files.read("first").clone()
    files.release_pages(copy)
    assert torch.equal(copy, torch.arange(2**20, dtype=torch.int32))


def test_less_than_a_page_is_not_released():
    values = np.ones(100, np.uint8)
    pages.release_pages(values.ctypes.data, 100)
    assert values.sum() == 100


SMAPS = b"""
7f00-7f10 r--p 00000000 fe:00 11 /opt/caf\xe9/libllvmlite.so
Rss: 16 kB
Anonymous: 0 kB
Swap: 0 kB
7f10-7f30 r-xp 00001000 fe:00 11 /opt/caf\xe9/libllvmlite.so
Anonymous: 0 kB
Swap: 0 kB
7f30-7f40 r--p 00003000 fe:00 11 /opt/caf\xe9/libllvmlite.so
Anonymous: 4 kB
Swap: 0 kB
7f40-7f50 r--p 00004000 fe:00 11 /opt/caf\xe9/libllvmlite.so
Anonymous: 0 kB
Swap: 4 kB
7f50-7f60 rw-p 00005000 fe:00 11 /opt/caf\xe9/libllvmlite.so
Anonymous: 0 kB
Swap: 0 kB
7f60-7f70 r-xp 00000000 fe:00 12 /opt/libother.so
Anonymous: 0 kB
Swap: 0 kB
7f70-7f80 r--p 00000000 00:00 0
Anonymous: 0 kB
Swap: 0 kB
""".strip()


def test_only_unmodified_read_only_mappings_of_the_library_are_released():
    assert pages._unchanged(b"libllvmlite", SMAPS) == [(0x7F00, 0x10), (0x7F10, 0x20)]


def test_with_an_unreadable_smaps_all_pages_of_the_kernel_compiler_stay():
    code = (
        "import pathlib\n"
        "def refuse(path): raise PermissionError(13, 'no')\n"
        "pathlib.Path.read_bytes = refuse\n"
        "from adaptkit.checkpoint.pages import release_kernel_compiler_pages\n"
        "release_kernel_compiler_pages()\n"
        "from adaptkit.compiled import _after_loading\n"
        "print(len(_after_loading))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "0", done.stderr


def test_repeated_calls_register_a_single_callback():
    code = (
        "from adaptkit.checkpoint.pages import release_kernel_compiler_pages\n"
        "from adaptkit.compiled import _after_loading\n"
        "for _ in range(3): release_kernel_compiler_pages()\n"
        "print(len(_after_loading))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "1", done.stderr


def test_the_kernel_compiler_is_released_and_still_works():
    def measured(given):
        code = LOADED.format(given=given)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return [float(part) for part in done.stdout.split()]

    before, after = measured(given=False)
    assert after > before
    assert measured(given=True)[1] < after - 30


TEAM = """
import re
import torch
from adaptkit.checkpoint.pages import release_kernel_compiler_pages
from adaptkit.numerics.kernels._cpu_joined import add_scaled
from adaptkit.team import _made

torch.set_num_threads(2)
release_kernel_compiler_pages()
add_scaled(torch.zeros(1024, 1024), torch.ones(1024, 1024, dtype=torch.bfloat16), 1.0)
report = open("/proc/self/smaps").read()
code = re.findall(r" r-xp .*libllvmlite\\S*\\n(?:\\w+:.*\\n)*?Rss: *(\\d+) kB", report)
print(len(_made), sum(map(int, code)) if code else None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_the_kernel_compiler_do_not_stay_after_it_made_the_function_of_a_team():
    """They took 38 MB in the first step on a 16-bit base."""
    done = subprocess.run([sys.executable, "-c", TEAM], capture_output=True, text=True, check=True)
    made, resident = done.stdout.split()
    if made == "0":
        pytest.skip("torch does not use GNU OpenMP")
    assert int(resident) < 1000
