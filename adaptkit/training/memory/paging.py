"""Fixed-size pages, some resident on the training device, the others in host memory.

    page          0 .. resident - 1    resident: permanently in a device slot of its own
                  resident .. pages    stored on the host; copied to a streaming slot once per sweep
    host          a file on a CPU, pinned memory for a GPU; allocated when first needed
    slots         resident + streaming: as many as the budget holds, at least one

Every optimizer step sweeps over all pages in order. Under such a cyclic sweep, LRU would evict each page just before it
is needed; so a fixed subset stays resident, and the others stream.

    host ──fetch──▶ streaming slot ──update──▶ streaming slot ──write back──▶ host
          inward stream           current stream             outward stream

On a GPU the three overlap for different pages. A fetch waits until the slot's previous page is written back; the update
waits for the fetch; the write-back waits for the update. All three are ordered by events: the host waits only where it
reads a page itself. On a CPU copies are synchronous: a prefetching thread was measured to gain nothing.
"""

import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from adaptkit.checkpoint.writer import disk_errors
from adaptkit.training.network.pinned import HostMemory

_ZEROS = bytes(1 << 20)
_PIECE = 64 << 20
"""Size of one pinned allocation. torch rounds these up to powers of two, so a single one for all pages could waste up
to half."""

STREAMING = {"cpu": 1, "cuda": 3}
"""Streaming slots by device type: on a GPU, one page each is being fetched, updated and written back."""


@dataclass
class PagingCounters:
    """Paging events since the start.

    Attributes:
        faults: pages copied from the host to a streaming slot for a sweep.
        write_backs: pages copied from a streaming slot to the host after their visit.
        evictions: resident pages moved to the host.
        retries: computations, mostly batches, that ran out of memory and were retried after freeing memory, whether or
            not by evicting pages.
    """

    faults: int = 0
    write_backs: int = 0
    evictions: int = 0
    retries: int = 0


def slots_within(budget_bytes: int | None, count: int, page_bytes: int) -> int:
    """Return how many of ``count`` pages the device has room for within a budget; see ``Pages``."""
    return count if budget_bytes is None else max(1, min(count, budget_bytes // page_bytes))


class Pages:
    """Pages of bytes, initially zero.

    Args:
        count: number of pages, at least one.
        page_bytes: size of each.
        budget_bytes: limit for pages on the device, where one page always fits; None: no limit.
        device: device that pages are used on.
        file: backs the host side on a CPU; unlinked once it is open. None: ordinary memory.

    Attributes:
        budget_bytes: current budget.
        counters: paging events.
        memory: host memory of pages on the host, unless they are in a file.
    """

    def __init__(
        self, count: int, page_bytes: int, budget_bytes: int | None, device: torch.device, file: Path | None = None
    ) -> None:
        self.count, self.page_bytes, self._device = count, page_bytes, device
        self._file = file if device.type == "cpu" else None
        self.counters = PagingCounters()
        self.memory = HostMemory(device)
        self._host: _Host | None = None
        self._resident: list[Tensor] = []
        self._stream = _Stream(device, page_bytes)
        self.budget_bytes = budget_bytes
        self._fit(new=True)

    @property
    def resident(self) -> int:
        """Number of pages that are resident on the device."""
        return len(self._resident)

    @property
    def slots(self) -> int:
        """Number of pages that the device has room for."""
        return self.resident + len(self._stream.slots)

    @property
    def can_shrink(self) -> bool:
        """Whether a smaller budget would free anything."""
        return self.slots > 1

    def set_budget(self, budget_bytes: int | None) -> None:
        """Change the budget: pages move immediately and keep their contents."""
        self.budget_bytes = budget_bytes
        self._fit(new=False)

    def sweep(self) -> Iterator[Tensor]:
        """Visit every page in order; writes to a page are kept.

        Yields:
            (page_bytes,) uint8 on the device, valid on its current stream until the next page is requested.
        """
        yield from self._resident
        host, first = self._host, self.resident
        if host is None or first == self.count:
            return
        ahead = len(self._stream.slots) - 1
        for page in range(first, self.count):
            for wanted in range(page, min(page + ahead + 1, self.count)):
                self._stream.fetch(wanted, host)
            self.counters.faults += 1
            yield self._stream.begin(page)
            self._stream.write_back(page, host)
            self.counters.write_backs += 1
        if self._device.type == "cuda":
            for page in range(first, min(first + ahead + 1, self.count)):
                self._stream.fetch(page, host)  # prefetched while the next step's gradients are computed

    def read(self, page: int) -> Tensor:
        """Return a page, (page_bytes,) uint8: on the device if it is resident, else on the host."""
        if page < self.resident:
            return self._resident[page]
        self._stream.synchronize()
        content = torch.empty(self.page_bytes, dtype=torch.uint8)
        self._hosted().get(page, content)
        return content

    def write(self, page: int, content: Tensor) -> None:
        """Overwrite a page with a tensor on the host."""
        if page < self.resident:
            self._resident[page].copy_(content)
        else:
            self._stream.forget()
            self._hosted().put(page, content)

    def metrics(self) -> dict[str, int]:
        """Return the page counts, the page size, and the counters."""
        shape = {"pages": self.count, "resident": self.resident, "slots": self.slots, "page_bytes": self.page_bytes}
        return shape | asdict(self.counters)

    def _fit(self, new: bool) -> None:
        slots = slots_within(self.budget_bytes, self.count, self.page_bytes)
        streaming = 0 if slots == self.count else min(slots, STREAMING[self._device.type])
        wanted = slots - streaming
        self._stream.resize(0)  # first, to free memory; pages in streaming slots are also stored on the host
        while self.resident > wanted:
            self._hosted().put(self.resident - 1, self._resident[-1])
            self._resident.pop()
            self.counters.evictions += 1
        for page in range(self.resident, wanted):
            slot = torch.zeros(self.page_bytes, dtype=torch.uint8, device=self._device)
            if not new:
                self._hosted().get(page, slot)
            self._resident.append(slot)
        if streaming:
            self._hosted()
        self._stream.resize(streaming)

    def _hosted(self) -> "_Host":
        if self._host is None:
            self._host = _Host(self.count, self.page_bytes, self.memory, self._file)
        return self._host


def _reserve(file: int, nbytes: int) -> None:
    """Allocate a file's blocks now, so that no later write can run out of disk space."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
        return
    with open(file, "r+b", closefd=False) as stream:  # macOS
        for start in range(0, nbytes, len(_ZEROS)):
            stream.write(_ZEROS[: nbytes - start])


class _Host:
    """Host storage of all pages.

    The file is read and written, not memory-mapped: a mapping takes a fault for every 4 KiB, which was measured to be
    four times slower, and mapped pages count as the process's memory.
    """

    def __init__(self, count: int, page_bytes: int, memory: HostMemory, path: Path | None) -> None:
        self._page_bytes, self._path, self._file = page_bytes, path or Path(), -1
        if path is not None:
            path.unlink(missing_ok=True)
            with disk_errors(path):
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                weakref.finalize(self, os.close, self._file)
                path.unlink()  # no other process can open it, and a killed process leaves no file behind
                _reserve(self._file, count * page_bytes)
            return
        pages = max(1, _PIECE // page_bytes)
        sizes = (min(pages, count - first) for first in range(0, count, pages))
        pieces = [memory.make(torch.zeros, size, page_bytes, dtype=torch.uint8) for size in sizes]
        self._pages = [page for piece in pieces for page in piece]

    def get(self, page: int, slot: Tensor) -> None:
        """Copy a page to a slot. On a GPU the copy is queued on the current stream, as in ``put``."""
        if self._file < 0:
            slot.copy_(self._pages[page], non_blocking=True)
        else:
            self._transfer(os.preadv, page, slot)

    def put(self, page: int, slot: Tensor) -> None:
        """Copy a slot to its page. Synchronize with the stream before reading the page."""
        if self._file < 0:
            self._pages[page].copy_(slot, non_blocking=True)
        else:
            self._transfer(os.pwritev, page, slot)

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], page: int, slot: Tensor) -> None:
        content, done = slot.numpy().data, 0
        with disk_errors(self._path):
            while done < self._page_bytes:
                done += call(self._file, [content[done:]], page * self._page_bytes + done)


class _Stream:
    """Streaming slots, and on a GPU the two CUDA streams that copy pages."""

    def __init__(self, device: torch.device, page_bytes: int) -> None:
        self._device, self._page_bytes = device, page_bytes
        self.slots: list[Tensor] = []
        self._held: list[int | None] = []
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._inward, self._outward = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
            self._ready: list[torch.cuda.Event] = []

    def resize(self, slots: int) -> None:
        """Wait for all copies, and change the number of slots; afterwards all are empty."""
        self.synchronize()
        self.slots = []
        self.slots = [torch.empty(self._page_bytes, dtype=torch.uint8, device=self._device) for _ in range(slots)]
        self._held = [None] * slots
        if self._cuda:
            self._ready = [torch.cuda.Event() for _ in range(slots)]  # type: ignore[no-untyped-call]
            # The slots' memory may have just been freed, with work still queued on the current stream.
            self._inward.wait_stream(torch.cuda.current_stream(self._device))
            for slot in self.slots:  # the last sweep's prefetch may still be in flight when the pages are freed
                slot.record_stream(self._inward)
                slot.record_stream(self._outward)

    def fetch(self, page: int, host: _Host) -> None:
        """Start copying a page to its slot, unless it is there or being copied."""
        slot = page % len(self.slots)
        if self._held[slot] == page:
            return
        self._held[slot] = page
        if not self._cuda:
            host.get(page, self.slots[slot])
            return
        # Write-backs are queued after all updates so far: once the outward stream is done, slot and page can be used.
        self._inward.wait_stream(self._outward)
        with torch.cuda.stream(self._inward):
            host.get(page, self.slots[slot])
            self._ready[slot].record(self._inward)

    def begin(self, page: int) -> Tensor:
        """Return the slot of a fetched page; make the current stream wait for the copy."""
        slot = page % len(self.slots)
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(self._ready[slot])
        return self.slots[slot]

    def write_back(self, page: int, host: _Host) -> None:
        """Start copying a page back to the host, after all work queued on the current stream so far."""
        slot = page % len(self.slots)
        self._held[slot] = None
        if not self._cuda:
            host.put(page, self.slots[slot])
            return
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            host.put(page, self.slots[slot])

    def forget(self) -> None:
        """Invalidate all slots, so that pages are fetched again."""
        self.synchronize()
        self._held = [None] * len(self.slots)

    def synchronize(self) -> None:
        """Wait until every copy is done."""
        if self._cuda:
            torch.cuda.current_stream(self._device).synchronize()
            self._inward.synchronize()
            self._outward.synchronize()
