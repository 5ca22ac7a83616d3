"""Tensors that are offloaded to host memory until they are needed again.

    forward     put: GPU ──side stream──▶ pinned host memory     all but the last two leave the GPU
    backward    take: the last one is still on the GPU; while it is used, the one put before it is fetched

The host runs far ahead of a GPU. With ``record_stream``, the allocator would hold memory that a side stream uses until
the GPU has finished with it. Instead, streams are ordered by events: a tensor is freed as soon as the current stream
has queued a wait for its copy, and fetched tensors are allocated on the current stream. torch reuses pinned memory.
"""

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptkit.training.network.pinned import HostMemory

_KEPT_ON_DEVICE = 2
"""Number of last tensors that stay on the GPU, at least until more are put: the backward pass needs them first."""


@dataclass(eq=False)
class _Item:
    """An offloaded tensor.

    Attributes:
        host: host copy; None once the tensor was taken.
        before: weak reference to the item that was put before it; None for the first.
        device: the tensor, while it is on the device or being copied there.
    """

    host: Tensor | None
    before: "weakref.ref[_Item] | None"
    device: Tensor | None = None


class OffloadedTensors:
    """Keeps tensors of one device in host memory.

    Args:
        device: device of the tensors. With a CPU they are only copied back and forth, which tests use.

    Attributes:
        memory: host memory that holds them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.memory = device, HostMemory(device)
        self._last: weakref.ref[_Item] | None = None
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        # Copies in flight: the device tensor (kept alive until then), the event that ends the copy, and the item.
        self._in_flight: deque[tuple[Tensor, Any, weakref.ref[_Item]]] = deque()
        if self._stream is not None:  # a failed backward pass leaves copies in flight
            weakref.finalize(self, self._stream.synchronize).atexit = False

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Move a tensor to host memory.

        Returns:
            A function that returns the tensor on the device; may be called once.
        """
        if self._last is None or self._last() is None:
            self._wait_for_copies(0, free=True)  # copies of a forward pass without a backward pass
        host = self.memory.make(torch.empty_like, tensor, device="cpu")
        item = _Item(host, self._last)
        self._last = weakref.ref(item)
        if self._stream is None:
            host.copy_(tensor)
        else:
            item.device = tensor
            self._copy(tensor, host, item)
            self._wait_for_copies(_KEPT_ON_DEVICE, free=True)
        return lambda: self._take(item)

    def _take(self, item: _Item) -> Tensor:
        if item.host is None:
            raise RuntimeError("this tensor was already taken back")
        self._fetch(item)
        self._wait_for_copies(0, free=False)
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
        """Queue a copy on the side stream, after all work queued on the current stream so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        self._in_flight.append((target if target.is_cuda else source, done, weakref.ref(item)))

    def _wait_for_copies(self, most: int, free: bool) -> None:
        """Make the current stream wait for all copies in flight but the last ``most``.

        Args:
            most: number of copies that may stay in flight.
            free: whether to free the device tensors of the others; the current stream may then reuse their memory.
        """
        while len(self._in_flight) > most:
            _, done, owner = self._in_flight.popleft()
            torch.cuda.current_stream(self._device).wait_event(done)
            item = owner()
            if free and item is not None:
                item.device = None
