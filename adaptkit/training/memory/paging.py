"""Fixed-size pages, some resident on the training device, the others in host memory.

    page          0 .. resident - 1    resident: each in a slot of its own, for good
                  resident .. pages    home is the host; visits the device in a streaming slot, once a sweep
    host          a file on a CPU, pinned memory beside a GPU; made when a page first needs it
    slots         resident ones + streaming ones: as many as the budget holds, at least one

An optimizer step sweeps over all pages in order, every time. Under such a cyclic sweep "least recently used" evicts
each page just before it is needed; so a fixed subset stays, and the others stream.

    host ──fetch──▶ streaming slot ──update──▶ streaming slot ──write back──▶ host
          inward stream           current stream             outward stream

On a GPU the three run at the same time for different pages. A fetch waits until the slot's last page is written back;
the update waits for the fetch; writing back waits for the update. All three are ordered by events: the host waits only
where it reads a page itself. On a CPU a copy is a copy: a thread that fetches ahead was measured to gain nothing.
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
"""Of pinned memory, which torch takes in powers of two: of one piece of all pages up to a half would go unused."""

STREAMING = {"cpu": 1, "cuda": 3}
"""Streaming slots: on a GPU one is fetched, one updated and one written back at a time."""


@dataclass
class PagingCounters:
    """What paging did so far.

    Attributes:
        faults: pages copied from host to a streaming slot, for a sweep.
        write_backs: pages copied from a streaming slot to host, after their visit.
        evictions: pages that lost their residence.
        retries: what ran out of memory, mostly batches, and was tried again with more room; not only that of pages.
    """

    faults: int = 0
    write_backs: int = 0
    evictions: int = 0
    retries: int = 0


class Pages:
    """Pages of bytes, all zero at first.

    Args:
        count: number of pages, at least one.
        page_bytes: size of each.
        budget_bytes: how much may be on the device; one page always is. None: everything.
        device: where pages are used.
        file: backs the host side on a CPU, without a name once it is open. None: ordinary memory.

    Attributes:
        budget_bytes: as it was given last.
        counters: of what moved.
        memory: of the pages that are on the host, but for those in a file.
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
        self._fit(budget_bytes, new=True)

    @property
    def resident(self) -> int:
        """Number of pages that stay on the device."""
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
        """Change how much may be on the device: pages move at once, and keep their bytes."""
        self.budget_bytes = budget_bytes
        self._fit(budget_bytes, new=False)

    def sweep(self) -> Iterator[Tensor]:
        """Visit every page in order; what is written to it is kept.

        Yields:
            (page_bytes,) uint8 on the device, to be used on its current stream before the next one is asked for.
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
                self._stream.fetch(page, host)  # on their way while the next step's gradients are computed

    def read(self, page: int) -> Tensor:
        """(page_bytes,) uint8, on the device if the page is resident, else on the host."""
        if page < self.resident:
            return self._resident[page]
        self._stream.synchronize()
        content = torch.empty(self.page_bytes, dtype=torch.uint8)
        self._hosted().get(page, content)
        return content

    def write(self, page: int, content: Tensor) -> None:
        """Replace a page's bytes by those of a tensor on the host."""
        if page < self.resident:
            self._resident[page].copy_(content)
        else:
            self._stream.forget()
            self._hosted().put(page, content)

    def metrics(self) -> dict[str, int]:
        """The page table's shape, and the counters."""
        shape = {"pages": self.count, "resident": self.resident, "slots": self.slots, "page_bytes": self.page_bytes}
        return shape | asdict(self.counters)

    def _fit(self, budget_bytes: int | None, new: bool) -> None:
        fit = self.count if budget_bytes is None else budget_bytes // self.page_bytes
        slots = max(1, min(self.count, fit))
        streaming = 0 if slots == self.count else min(slots, STREAMING[self._device.type])
        wanted = slots - streaming
        self._stream.resize(0)  # first, so that there is room; its pages are at home on the host
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
    """Give a file its bytes now, so that no write in it can fail later on."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
        return
    with open(file, "r+b", closefd=False) as stream:  # macOS
        for start in range(0, nbytes, len(_ZEROS)):
            stream.write(_ZEROS[: nbytes - start])


class _Host:
    """The host's side of every page.

    A file is read and written, not mapped into memory: a mapping takes a fault for every 4 KiB, which was measured to
    be four times slower, and what is mapped counts as the process's memory.
    """

    def __init__(self, count: int, page_bytes: int, memory: HostMemory, path: Path | None) -> None:
        self._page_bytes, self._path, self._file = page_bytes, path or Path(), -1
        if path is not None:
            path.unlink(missing_ok=True)
            with disk_errors(path):
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                weakref.finalize(self, os.close, self._file)
                path.unlink()  # nobody else opens it, and of a process that is killed nothing is left
                _reserve(self._file, count * page_bytes)
            return
        pages = max(1, _PIECE // page_bytes)
        sizes = (min(pages, count - first) for first in range(0, count, pages))
        pieces = [memory.make(torch.zeros, size, page_bytes, dtype=torch.uint8) for size in sizes]
        self._pages = [page for piece in pieces for page in piece]

    def get(self, page: int, slot: Tensor) -> None:
        """Copy a page to a slot. On a GPU this is queued on the current stream, as is ``put``."""
        if self._file < 0:
            slot.copy_(self._pages[page], non_blocking=True)
        else:
            self._transfer(os.preadv, page, slot)

    def put(self, page: int, slot: Tensor) -> None:
        """Copy a slot to its page; whoever reads the page waits for the stream first."""
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
    """Slots through which pages pass, and on a GPU the two streams that copy."""

    def __init__(self, device: torch.device, page_bytes: int) -> None:
        self._device, self._page_bytes = device, page_bytes
        self.slots: list[Tensor] = []
        self._held: list[int | None] = []
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._inward, self._outward = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
            self._ready: list[torch.cuda.Event] = []

    def resize(self, slots: int) -> None:
        """Change the number of slots; afterwards all are empty. Nothing is still being copied when this returns."""
        self.synchronize()
        self.slots = []
        self.slots = [torch.empty(self._page_bytes, dtype=torch.uint8, device=self._device) for _ in range(slots)]
        self._held = [None] * slots
        if self._cuda:
            self._ready = [torch.cuda.Event() for _ in range(slots)]  # type: ignore[no-untyped-call]
            self._inward.wait_stream(torch.cuda.current_stream(self._device))  # the slots' memory may just be freed

    def fetch(self, page: int, host: _Host) -> None:
        """Begin to copy a page to its slot, unless it is there or on its way."""
        slot = page % len(self.slots)
        if self._held[slot] == page:
            return
        self._held[slot] = page
        if not self._cuda:
            host.get(page, self.slots[slot])
            return
        # The outward stream ran behind every update so far; when it is done, so are the slot and the page.
        self._inward.wait_stream(self._outward)
        with torch.cuda.stream(self._inward):
            host.get(page, self.slots[slot])
            self._ready[slot].record(self._inward)

    def begin(self, page: int) -> Tensor:
        """The slot of a page that was fetched; what comes next on the current stream waits for the copy."""
        slot = page % len(self.slots)
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(self._ready[slot])
        return self.slots[slot]

    def write_back(self, page: int, host: _Host) -> None:
        """Begin to copy a page home, behind all that the current stream was told to do so far."""
        slot = page % len(self.slots)
        self._held[slot] = None
        if not self._cuda:
            host.put(page, self.slots[slot])
            return
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            host.put(page, self.slots[slot])

    def forget(self) -> None:
        """Take no page for fetched any more."""
        self.synchronize()
        self._held = [None] * len(self.slots)

    def synchronize(self) -> None:
        """Wait until every copy is done."""
        if self._cuda:
            torch.cuda.current_stream(self._device).synchronize()
            self._inward.synchronize()
            self._outward.synchronize()
