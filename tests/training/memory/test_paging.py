"""Pages keep their bytes wherever they are stored, and the counters record their moves."""

import os
from pathlib import Path

import pytest
import torch

from adaptkit.checkpoint.writer import DiskError
from adaptkit.training.memory.moments import PagedState
from adaptkit.training.memory.paging import Pages

CPU = torch.device("cpu")


def sweeps(pages, count):
    for _ in range(count):
        for page in pages.sweep():
            page += 1


def test_a_cyclic_sweep_reuses_the_resident_subset():
    """With 4 slots for 10 pages, 3 pages stay; least-recently-used would fault on every page of every sweep."""
    pages = Pages(10, 80, 4 * 80, CPU)
    sweeps(pages, 5)
    assert pages.metrics() == {
        "pages": 10, "resident": 3, "slots": 4, "page_bytes": 80, "faults": 35, "write_backs": 35, "evictions": 0,
        "retries": 0,
    }  # fmt: skip
    everything = Pages(10, 80, None, CPU)
    sweeps(everything, 5)
    assert (everything.resident, everything.counters.faults) == (10, 0)


@pytest.mark.parametrize("budget", [1, 170, 800, None])
@pytest.mark.parametrize("backed", [True, False])
def test_pages_written_in_a_sweep_are_read_back_in_the_next(budget, backed, tmp_path):
    pages = Pages(10, 80, budget, CPU, tmp_path / "pages.bin" if backed else None)
    for number, page in enumerate(pages.sweep()):
        assert not page.any()
        page[:] = number
    assert [set(page.tolist()) for page in pages.sweep()] == [{number} for number in range(10)]
    assert [set(pages.read(page).tolist()) for page in range(10)] == [{number} for number in range(10)]


def test_the_file_that_backs_pages_is_unlinked_so_that_a_killed_process_leaves_none(tmp_path):
    """Processes other than the first have it in a temporary folder, which no later run cleans up."""

    open_files = Path("/proc/self/fd")  # on Linux

    def held():
        return [os.readlink(link) for link in open_files.iterdir() if link.is_symlink()]

    (tmp_path / "pages.bin").write_bytes(b"of one that was killed before")
    pages = Pages(10, 80, 170, CPU, tmp_path / "pages.bin")
    sweeps(pages, 2)
    assert not open_files.exists() or f"{tmp_path}/pages.bin (deleted)" in held()
    assert list(tmp_path.iterdir()) == []
    assert pages.read(9).tolist() == [2] * 80


def test_pages_keep_their_bytes_when_the_budget_changes(tmp_path):
    pages = Pages(9, 4096, None, CPU, tmp_path / "pages.bin")
    for number, page in enumerate(pages.sweep()):
        page[:] = number
    seen = []
    for budget in (1, 5 * 4096, None, 3 * 4096, 0, 9 * 4096):
        pages.set_budget(budget)
        seen.append((pages.resident, pages.slots))
        assert [page.tolist() for page in pages.sweep()] == [[number] * 4096 for number in range(9)]
    assert seen == [(0, 1), (4, 5), (9, 9), (2, 3), (0, 1), (9, 9)]
    assert pages.counters.evictions == 9 + 7 + 2
    pages.write(3, torch.full((4096,), 77, dtype=torch.uint8))
    assert pages.read(3).tolist() == [77] * 4096


def test_too_little_disk_space_is_an_error_before_the_first_step(tmp_path):
    with pytest.raises(DiskError, match=r"pages\.bin"):
        Pages(1 << 40, 1 << 20, 1, CPU, tmp_path / "pages.bin")


def test_a_sweep_of_the_moments_visits_every_page_once():
    state = PagedState(60_000, 1, 8 * 30_000, CPU)
    assert sum(1 for _ in state.sweep()) == 60_000
    assert state.pages.counters.faults == 30_001
