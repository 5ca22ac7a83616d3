"""Tensors that wait in host memory until they are needed again.

    forward     put: GPU ──side stream──▶ pinned host memory     all but the last two leave the GPU
    backward    take: the last one is still there, and the one put before it is fetched while it is used

The host runs far ahead of a GPU, and the allocator keeps memory that another stream uses until the GPU is done. So
memory is handed over by events alone: a tensor goes as soon as the current stream was told to wait for its copy, and
what is fetched lies in memory of the current stream's. Pinned memory is torch's to use again.
"""

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptkit.training.network.pinned import HostMemory

_STAYING = 2
"""Tensors that have not left the GPU, or not yet: those that are needed first."""


@dataclass(eq=False)
class _Item:
    """A tensor on the shelf.

    Attributes:
        host: its bytes; None once it was taken.
        before: what was put before it, if that is still wanted.
        device: the tensor, while it is on the device or on its way there.
    """

    host: Tensor | None
    before: "weakref.ref[_Item] | None"
    device: Tensor | None = None


class Shelf:
    """Keeps tensors of one device in host memory.

    Args:
        device: where they come from. On a CPU they are copied there and back, which saves nothing; tests do that.

    Attributes:
        memory: that they wait in.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.memory = device, HostMemory(device)
        self._last: weakref.ref[_Item] | None = None
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        # What is being copied: the tensor on the device, when that is done, and whose it is.
        self._moving: deque[tuple[Tensor, Any, weakref.ref[_Item]]] = deque()

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Move a tensor to host memory.

        Returns:
            A function that gives it back, once.
        """
        if self._last is None or self._last() is None:
            self._settle(0, leave=True)  # of a pass that nobody went back through
        host = self.memory.make(torch.empty_like, tensor, device="cpu")
        item = _Item(host, self._last)
        self._last = weakref.ref(item)
        if self._stream is None:
            host.copy_(tensor)
        else:
            item.device = tensor
            self._copy(tensor, host, item)
            self._settle(_STAYING, leave=True)
        return lambda: self._take(item)

    def _take(self, item: _Item) -> Tensor:
        if item.host is None:
            raise RuntimeError("this tensor was taken from the shelf before")
        self._fetch(item)
        self._settle(0, leave=False)
        before = item.before() if item.before else None
        if before is not None:
            self._fetch(before)
        tensor, item.device, item.host = item.device, None, None
        if tensor is None:
            raise RuntimeError("what was fetched is not there")
        return tensor

    def _fetch(self, item: _Item) -> None:
        if item.host is None or item.device is not None:
            return
        item.device = torch.empty_like(item.host, device=self._device)
        if self._stream is None:
            item.device.copy_(item.host)
        else:
            self._copy(item.host, item.device, item)

    def _copy(self, source: Tensor, target: Tensor, item: _Item) -> None:
        """Begin to copy on the side stream, behind all that the current one was told to do so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        self._moving.append((target if target.is_cuda else source, done, weakref.ref(item)))

    def _settle(self, most: int, leave: bool) -> None:
        """Let all that comes next on the current stream wait for the copies, but for so many of the last.

        Args:
            most: copies that may still be under way.
            leave: whether the others' tensors go from the device. Their memory is then the current stream's to use.
        """
        while len(self._moving) > most:
            _, done, owner = self._moving.popleft()
            torch.cuda.current_stream(self._device).wait_event(done)
            item = owner()
            if leave and item is not None:
                item.device = None
