"""Tensors that wait in host memory until they are needed again.

    forward     put: GPU ──side stream──▶ pinned host memory        the GPU's copy goes when that is done
    backward    the last one that was put is fetched first, and the one put before it at the same time

A pinned buffer is taken from a pool and goes back to it when its tensor is fetched, so after one step nothing is
allocated any more. All copies are on one stream, so a buffer is not overwritten before it was read.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class _Item:
    """A tensor on the shelf.

    Attributes:
        host: its bytes; None once it was fetched.
        before: what was put before it, if that is still wanted.
        device: the tensor, once it was asked for or is on its way.
        ready: when it is there.
    """

    host: Tensor | None
    before: "weakref.ref[_Item] | None"
    device: Tensor | None = None
    ready: Any = None


class Shelf:
    """Keeps tensors of one device in host memory.

    Args:
        device: where they come from. On a CPU they are copied there and back, which saves nothing; tests do that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: weakref.ref[_Item] | None = None
        self._pool: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Move a tensor to host memory.

        Returns:
            A function that gives it back, once.
        """
        pool = self._pool.setdefault((tensor.shape, tensor.dtype), [])
        host = pool.pop() if pool else torch.empty_like(tensor, device="cpu", pin_memory=self._stream is not None)
        if self._stream is None:
            host.copy_(tensor)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)  # its memory is not used again before the copy is done
        item = _Item(host, self._last)
        self._last = weakref.ref(item)
        return lambda: self._take(item)

    def _take(self, item: _Item) -> Tensor:
        before = item.before() if item.before else None
        for wanted in (item, before):
            if wanted is not None:
                self._fetch(wanted)
        tensor, item.device = item.device, None
        if tensor is None:
            raise RuntimeError("this tensor was taken from the shelf before")
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(item.ready)
            tensor.record_stream(torch.cuda.current_stream(self._device))
        return tensor

    def _fetch(self, item: _Item) -> None:
        if item.host is None:
            return
        host, item.host = item.host, None
        if self._stream is None:
            item.device = host.clone()
        else:
            with torch.cuda.stream(self._stream):
                item.device = host.to(self._device, non_blocking=True)
                item.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                item.ready.record(self._stream)
        self._pool[host.shape, host.dtype].append(host)
