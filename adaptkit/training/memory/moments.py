"""Paged first and second moments of AdamW.

    32 bits    first (E,) float32 | second (E,) float32
    8 bits     first codes (E,) uint8 | second codes | first absmax (E / 256,) float32 | second absmax

A page holds both moments of E consecutive parameters, regardless of matrix boundaries. An 8-bit page is decoded when it
is visited and encoded afterwards. Blocks never straddle pages, so results do not depend on the size or number of pages.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from mmap import PAGESIZE
from pathlib import Path

import torch
from torch import Tensor

from adaptkit.training.memory.adamw import BLOCK, decode, encode, moment_bytes
from adaptkit.training.memory.paging import Pages
from adaptkit.training.memory.vector import Vector

_NAMES = ("first_moment", "second_moment")
_SIGNED = (True, False)


def page_elements(page_bytes: int, bits: int) -> int:
    """Return how many parameters' moments fit into a page: whole blocks, at least one."""
    blocks = page_bytes // (8 * BLOCK if bits == 32 else 2 * BLOCK + 8)
    return max(1, blocks) * BLOCK


def bytes_of_page(elements: int, bits: int) -> int:
    """Return the size of a page; with 8 bits whole pages of the OS, so that it can reclaim each page separately."""
    size = moment_bytes(elements, bits)
    return size if bits == 32 else -(-size // PAGESIZE) * PAGESIZE


class PagedState:
    """Two moments for each of ``count`` parameters, initially zero.

    Args:
        count: number of parameters.
        elements: number of parameters per page; with 8 bits a whole number of blocks.
        budget_bytes: see ``Pages``.
        device: see ``Pages``.
        file: see ``Pages``.
        bits: bits per moment: 32 or 8.
    """

    def __init__(
        self,
        count: int,
        elements: int,
        budget_bytes: int | None,
        device: torch.device,
        file: Path | None = None,
        bits: int = 32,
    ) -> None:
        self.count, self._elements, self._bits = count, elements, bits
        self.pages = Pages(-(-count // elements), bytes_of_page(elements, bits), budget_bytes, device, file)
        scratch = (2, elements) if bits == 8 else (0,)
        self._scratch = torch.empty(scratch, device=device)

    def stays(self, page: int) -> bool:
        """Return whether a page's moments stay valid after ``sweep`` continues, so that pages can be updated together.

        True for resident 32-bit pages on a GPU, to save launches. On a CPU each page is updated while in its caches.
        """
        return self._bits == 32 and page < self.pages.resident and self._scratch.is_cuda

    def sweep(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Visit every page in order; writes to the moments are kept, with 8 bits after rounding.

        Yields:
            Range of the parameters, and their first and second moments: float32 on the training device.
        """
        for page, content in enumerate(self.pages.sweep()):
            span = self._span(page)
            size = span.stop - span.start
            parts = self._parts(content, size)
            if self._bits == 32:
                yield span, parts["first_moment"], parts["second_moment"]
                continue
            moments = self._scratch[0, :size], self._scratch[1, :size]
            for name, moment, signed in zip(_NAMES, moments, _SIGNED, strict=True):
                decode(parts[f"{name}_codes"], parts[f"{name}_absmax"], moment, signed=signed)
            yield span, *moments
            for name, moment, signed in zip(_NAMES, moments, _SIGNED, strict=True):
                encode(moment, parts[f"{name}_codes"], parts[f"{name}_absmax"], signed=signed)

    def vectors(self) -> dict[str, Vector]:
        """Return the state by name, as a checkpoint stores it. Its bytes depend on neither page size nor budget."""
        kinds = {name: (torch.float32, 1) for name in _NAMES}
        if self._bits == 8:
            kinds = {f"{name}_codes": (torch.uint8, 1) for name in _NAMES}
            kinds |= {f"{name}_absmax": (torch.float32, BLOCK) for name in _NAMES}
        return {
            name: Vector(dtype, -(-self.count // scale), partial(self._read, name, scale), self._elements // scale)
            for name, (dtype, scale) in kinds.items()
        }

    def load(self, vectors: Mapping[str, Vector]) -> None:
        """Set the whole state from the result of ``vectors``, possibly of a state with another page size."""
        for page in range(self.pages.count):
            span = self._span(page)
            content = torch.zeros(self.pages.page_bytes, dtype=torch.uint8)
            for name, part in self._parts(content, span.stop - span.start).items():
                scale = BLOCK if name.endswith("absmax") else 1
                part.copy_(vectors[name].read(span.start // scale, part.numel()))
            self.pages.write(page, content)

    def _read(self, name: str, scale: int, start: int, count: int) -> Tensor:
        """Read part of a vector, see ``Vector.read``; usually from one page."""
        parts = []
        while count:
            page, offset = divmod(start, self._elements // scale)
            span = self._span(page)
            part = self._parts(self.pages.read(page), span.stop - span.start)[name][offset : offset + count].cpu()
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _span(self, page: int) -> slice:
        return slice(page * self._elements, min((page + 1) * self._elements, self.count))

    def _parts(self, content: Tensor, size: int) -> dict[str, Tensor]:
        """Return views of a page's parts by name, with the lengths for ``size`` parameters."""
        elements, blocks = self._elements, -(-size // BLOCK)
        if self._bits == 32:
            numbers = content.view(torch.float32)
            return {"first_moment": numbers[:size], "second_moment": numbers[elements : elements + size]}
        constants = content[2 * elements : moment_bytes(elements, 8)].view(torch.float32)
        per_moment = elements // BLOCK
        return {
            "first_moment_codes": content[:size],
            "second_moment_codes": content[elements : elements + size],
            "first_moment_absmax": constants[:blocks],
            "second_moment_absmax": constants[per_moment : per_moment + blocks],
        }
