"""Optimizer state in fixed-size pages, some resident, the rest in host memory.

    a page        [first moment | second moment] of ``page_elements`` parameters, float32
    host          every page: a memory-mapped file on a CPU, pinned memory beside a GPU
    slots         the resident pages, on the training device, as many as the budget allows

An optimizer step sweeps over all pages in order, every time. Under such a cyclic sweep "least recently used" evicts
each page just before it is needed; so a fixed subset stays resident, and the others pass through the last slot.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

_BYTES = 4


@dataclass
class PagingCounters:
    """What paging did so far.

    Attributes:
        faults: pages copied from host to a slot.
        evictions: pages that made room for another.
        write_backs: pages copied from a slot to host.
    """

    faults: int = 0
    evictions: int = 0
    write_backs: int = 0


class PagedState:
    """Two moments for each of ``count`` parameters.

    Args:
        count: number of parameters.
        page_elements: parameters a page holds the moments of.
        budget_bytes: how much may be resident; at least one page is. None: everything.
        device: where the resident pages are.
        file: backs the host side on a CPU; made anew. None: ordinary memory.
    """

    def __init__(
        self, count: int, page_elements: int, budget_bytes: int | None, device: torch.device, file: Path | None = None
    ) -> None:
        self.count, self.page_elements, self._device = count, page_elements, device
        self.pages = -(-count // page_elements)
        elements = self.pages * 2 * page_elements
        if device.type == "cuda":
            host = torch.zeros(elements, pin_memory=True)
        elif file is not None:
            file.unlink(missing_ok=True)
            host = torch.from_file(str(file), shared=True, size=elements, dtype=torch.float32)
        else:
            host = torch.zeros(elements)
        self._host = host.view(self.pages, 2, page_elements)
        self.counters = PagingCounters()
        self._held: list[int | None] = []
        self._slots = torch.empty(0)
        self.set_budget(budget_bytes)

    @property
    def page_bytes(self) -> int:
        """Size of a page."""
        return 2 * self.page_elements * _BYTES

    @property
    def slots(self) -> int:
        """Number of pages that can be resident."""
        return self._slots.shape[0]

    def set_budget(self, budget_bytes: int | None) -> None:
        """Change how much may be resident; takes effect at once and changes no value."""
        self.flush()
        self._slots = torch.empty(0)  # first, so that old and new slots never exist together
        fit = self.pages if budget_bytes is None else budget_bytes // self.page_bytes
        self._slots = torch.empty((max(1, min(self.pages, fit)), 2, self.page_elements), device=self._device)
        self._held = [None] * self.slots

    def sweep(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Visit every page in order; what is written to the moments is kept.

        Yields:
            Which parameters, and views of their first and second moments on the training device.
        """
        for page in range(self.pages):
            slot = self._fetch(page)
            start = page * self.page_elements
            size = min(self.page_elements, self.count - start)
            yield slice(start, start + size), self._slots[slot, 0, :size], self._slots[slot, 1, :size]

    def flush(self) -> None:
        """Copy every resident page to host."""
        for slot, page in enumerate(self._held):
            if page is not None:
                self._write_back(page, slot)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Both moments of all parameters, (count,) float32 each, as copies on the host."""
        self.flush()
        return (
            self._host[:, 0].reshape(-1)[: self.count].clone(),
            self._host[:, 1].reshape(-1)[: self.count].clone(),
        )

    def load_moments(self, first: Tensor, second: Tensor) -> None:
        """Set both moments of all parameters, (count,) each."""
        self._held = [None] * self.slots
        for index, moment in enumerate((first, second)):
            padded = torch.nn.functional.pad(moment, (0, self.pages * self.page_elements - self.count))
            self._host[:, index] = padded.view(self.pages, self.page_elements)

    def metrics(self) -> dict[str, int]:
        """Counters and the shape of the page table."""
        return {"pages": self.pages, "slots": self.slots, "page_bytes": self.page_bytes} | asdict(self.counters)

    def _fetch(self, page: int) -> int:
        slot = min(page, self.slots - 1)  # the last slot is the one through which pages pass
        held = self._held[slot]
        if held == page:
            return slot
        if held is not None:
            self._write_back(held, slot)
            self.counters.evictions += 1
        self._slots[slot].copy_(self._host[page])
        self.counters.faults += 1
        self._held[slot] = page
        return slot

    def _write_back(self, page: int, slot: int) -> None:
        self._host[page].copy_(self._slots[slot])
        self.counters.write_backs += 1
