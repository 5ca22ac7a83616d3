"""A layer between this process and the files below a folder, which can disturb each call that reaches the disk.

It is meant for a forked child: it replaces functions of ``os`` and ``open``, and is never removed. A hook is called
before and after each call, and may end the process or raise an error of the disk.
"""

import builtins
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

WRITES = ("write", "fsync", "rename", "create", "mkdir", "unlink", "rmdir", "truncate")
"""Kinds of calls that change a disk; the other kinds are "read", and "request" for the network."""


@dataclass(frozen=True)
class Call:
    """A call that reaches the disk.

    Attributes:
        number: number of the call, from 0; writes, reads and requests are counted separately.
        kind: one of ``WRITES``, "read" or "request".
        path: path of the file or folder, with links resolved; for a request, its method and path.
        target: new path, for a rename.
        before: whether the call has not been made yet.
    """

    number: int
    kind: str
    path: str
    target: str = ""
    before: bool = True


Hook = Callable[[Call], int | None]
"""May return how many bytes to write, which makes it a short write."""


class Layer:
    """Watches one folder.

    Args:
        root: the folder; calls for other paths are ignored.
        hook: called before and after each call.
    """

    def __init__(self, root: Path, hook: Hook) -> None:
        self._root = os.path.realpath(root) + os.sep
        self._hook = hook
        self._numbers = {"read": 0, "request": 0, "write": 0}

    def around(self, kind: str, path: str, act: Callable[[int | None], Any], target: str = "") -> Any:
        """Make a call, and call the hook before and after it."""
        counter = "write" if kind in WRITES else kind
        number = self._numbers[counter]
        self._numbers[counter] += 1
        done = act(self._hook(Call(number, kind, path, target)))
        self._hook(Call(number, kind, path, target, before=False))
        return done

    def place(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return the absolute path that a call refers to, if it is below the root."""
        if isinstance(path, int):
            whole = os.readlink(f"/proc/self/fd/{path}")
        elif isinstance(path, (str, bytes, os.PathLike)):
            folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            folder, name = os.path.split(os.path.join(folder, os.fsdecode(path)))
            whole = os.path.join(os.path.realpath(folder), name)
        else:
            return None
        return whole if (whole + os.sep).startswith(self._root) else None

    def install(self) -> None:
        """Replace the functions with which adaptkit and its libraries access the disk and the network."""
        self._wrap("fsync", "fsync")
        self._wrap("fdatasync", "fsync")
        self._wrap("mkdir", "mkdir")
        self._wrap("rmdir", "rmdir")
        self._wrap("unlink", "unlink")
        self._wrap("remove", "unlink")
        self._wrap("truncate", "truncate")
        self._wrap("ftruncate", "truncate")
        for name in ("write", "pwrite", "pwritev", "writev"):
            self._wrap(name, "write")
        for name in ("read", "pread", "preadv", "readv"):
            self._wrap(name, "read")
        self._wrap("sendfile", "write")
        for name in ("rename", "replace"):
            self._wrap_rename(name)
        self._wrap_open()
        self._wrap_requests()

    def _wrap(self, name: str, kind: str) -> None:
        original = getattr(os, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            place = self.place(path, options.get("dir_fd"))
            if place is None:
                return original(path, *arguments, **options)
            return self.around(kind, place, lambda size: original(path, *arguments, **options))

        setattr(os, name, call)

    def _wrap_rename(self, name: str) -> None:
        original = getattr(os, name)

        def call(source: Any, target: Any, **options: Any) -> Any:
            places = self.place(source, options.get("src_dir_fd")), self.place(target, options.get("dst_dir_fd"))
            if places[0] is None or places[1] is None:
                return original(source, target, **options)
            return self.around("rename", places[0], lambda size: original(source, target, **options), places[1])

        setattr(os, name, call)

    def _wrap_open(self) -> None:
        plain, low = io.open, os.open

        def opened(file: Any, mode: str = "r", buffering: int = -1, *texts: Any, **options: Any) -> Any:
            place = None if isinstance(file, int) else self.place(file)
            if place is None or options.get("opener"):
                return plain(file, mode, buffering, *texts, **options)
            return self._open(place, mode, buffering, texts, options)

        def opened_low(path: Any, flags: int, *arguments: Any, **options: Any) -> Any:
            place = self.place(path, options.get("dir_fd"))
            if place is None or not flags & os.O_CREAT or os.path.lexists(place):
                return low(path, flags, *arguments, **options)
            return self.around("create", place, lambda size: low(path, flags, *arguments, **options))

        builtins.open = io.open = opened
        os.open = opened_low

    def _open(self, place: str, mode: str, buffering: int, texts: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Build the same objects as ``open``, on a raw file that reports its calls to the layer."""
        raw_mode = mode.replace("b", "").replace("t", "")

        def make(size: int | None) -> _Raw:
            return _Raw(self, place, raw_mode)

        if os.path.lexists(place) and "w" in mode:
            raw = self.around("truncate", place, make)
        elif not os.path.lexists(place) and raw_mode[0] in "wxa":
            raw = self.around("create", place, make)
        else:
            raw = make(None)
        if buffering == 0:
            return raw
        kind: Any = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
        return kind(raw) if "b" in mode else io.TextIOWrapper(kind(raw), *texts, **options)

    def _wrap_requests(self) -> None:
        original = httpx.Client.send

        def send(client: Any, request: Any, *arguments: Any, **options: Any) -> Any:
            what = f"{request.method} {request.url.path}"
            return self.around("request", what, lambda size: original(client, request, *arguments, **options))

        httpx.Client.send = send  # type: ignore[method-assign]


class _Raw(io.FileIO):
    """A raw file that reports its reads and writes to a layer."""

    def __init__(self, layer: Layer, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self._layer, self._path = layer, path

    def _around(self, kind: str, act: Callable[[int | None], Any]) -> Any:
        return self._layer.around(kind, self._layer.place(self.fileno()) or self._path, act)

    def write(self, data: Any) -> Any:
        return self._around("write", lambda size: io.FileIO.write(self, memoryview(data).cast("B")[:size]))

    def readinto(self, buffer: Any) -> Any:
        return self._around("read", lambda size: io.FileIO.readinto(self, buffer))

    def read(self, size: int | None = -1) -> Any:
        return self._around("read", lambda _: io.FileIO.read(self, -1 if size is None else size))

    def readall(self) -> Any:
        return self._around("read", lambda size: io.FileIO.readall(self))
