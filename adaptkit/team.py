"""Kernels whose rows are divided among the threads in which torch multiplies matrices.

Threads of our own would find no processor free: after a product torch's wait for the next one without giving theirs up.
They are OpenMP's, and in torch's builds for Linux those of GNU's library, which takes the address of a function that
all threads of a team are to run. Where that library is not loaded, a kernel is run by the thread that calls it.
"""

import ctypes
import functools
import inspect
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from adaptkit.compiled import Kernel, load_text

_LEAST = 1 << 14
"""Elements that are worth a thread."""

_SHARE = """
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define void @share(ptr %data) {
    %number.of = load ptr, ptr %data
    %place.1 = getelementptr i64, ptr %data, i64 1
    %count.of = load ptr, ptr %place.1
    %place.2 = getelementptr i64, ptr %data, i64 2
    %kernel = load ptr, ptr %place.2
    %place.3 = getelementptr i64, ptr %data, i64 3
    %rows = load i64, ptr %place.3
    %place.4 = getelementptr i64, ptr %data, i64 4
    %size = load i64, ptr %place.4
    %failed = getelementptr i64, ptr %data, i64 5
    %cells = getelementptr i64, ptr %data, i64 6

    %number.32 = call i32 %number.of()
    %number = zext i32 %number.32 to i64
    %count.32 = call i32 %count.of()
    %count = zext i32 %count.32 to i64
    %before = mul i64 %rows, %number
    %first = udiv i64 %before, %count
    %with = add i64 %before, %rows
    %last = udiv i64 %with, %count

    %own = alloca i64, i64 %size
    %unused = alloca i64
    %bytes = mul i64 %size, 8
    call void @llvm.memcpy.p0.p0.i64(ptr %own, ptr %cells, i64 %bytes, i1 false)
    %end = getelementptr i64, ptr %own, i64 %size
    %place.thread = getelementptr i64, ptr %end, i64 -3
    store i64 %number, ptr %place.thread
    %place.first = getelementptr i64, ptr %end, i64 -2
    store i64 %first, ptr %place.first
    %place.last = getelementptr i64, ptr %end, i64 -1
    store i64 %last, ptr %place.last
    %status = call i32 %kernel(ptr %unused, ptr %unused, ptr %own)
    %fine = icmp eq i32 %status, 0
    br i1 %fine, label %done, label %bad
bad:
    %wide = zext i32 %status to i64
    store i64 %wide, ptr %failed
    br label %done
done:
    ret void
}
"""
"""What every thread of a team runs: the kernel, for its part of the rows, with cells of its own.

The data are addresses of two functions of OpenMP's and of the kernel, the rows, the number of cells, a place for what a
kernel says that failed, and the cells, of which the last three are a ``Part``.
"""


class Part(NamedTuple):
    """Of the rows, what one thread computes.

    Attributes:
        thread: its number, from 0.
        first: row.
        last: one past the last row.
    """

    thread: int
    first: int
    last: int


class Shared(Kernel):
    """A kernel that gives nothing, and writes nothing that it computes of another row's.

    Its function has one argument more than it is called with, the last one: the ``Part`` that it computes.

    Args:
        function: what is compiled.
        divided: the name of the argument whose first axis has the rows.
    """

    def __init__(self, function: Callable[..., Any], divided: str) -> None:
        super().__init__(function, {})
        self._divided = list(inspect.signature(function).parameters).index(divided)

    def __call__(self, *arguments: Any) -> None:
        """Run it, in as many threads as torch has and the rows are worth."""
        array = arguments[self._divided]
        rows = len(array)
        entry, cells = self._prepare((*arguments, Part(0, 0, rows)))
        threads = min(rows, array.size // _LEAST)
        if threads < 2 or (threads := min(threads, team_size())) < 2:
            entry(cells)
            return
        number, count, run = _openmp()
        packed = entry.pack(*cells)
        head = struct.pack("6Q", number, count, entry.address, rows, len(packed) // 8, 0)
        data = ctypes.create_string_buffer(head + packed, len(head) + len(packed))
        run(_share()[1], data, threads, 0)
        (status,) = struct.unpack_from("Q", data, len(head) - 8)
        if status:
            raise SystemError(f"a kernel failed ({status})")


def shared(divided: str) -> Callable[[Callable[..., Any]], Shared]:
    """Decorate a kernel whose rows are divided among threads; see ``Shared``."""
    return lambda function: Shared(function, divided)


def team_size() -> int:
    """How many threads kernels may be divided among: torch's, where it is loaded and they are of that library."""
    threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return 1 if threads is None or _openmp() is None else int(threads())


def keeps_up(threads: int) -> bool:
    """Whether a kernel is faster in one pass than torch in several by so many threads: they are its own, or few."""
    return threads <= 2 or team_size() == threads


@functools.cache
def _openmp() -> Any:
    """Where the functions are that say which thread of a team this is, and of how many, and what runs a team; or None.

    Looked for in all that is loaded, once torch is.
    """
    loaded = ctypes.CDLL(None)
    if sys.platform != "linux" or not all(hasattr(loaded, name) for name in _FUNCTIONS):
        return None
    number, count, run = (getattr(loaded, name) for name in _FUNCTIONS)
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return *(ctypes.cast(function, ctypes.c_void_p).value for function in (number, count)), run


_FUNCTIONS = "omp_get_thread_num", "omp_get_num_threads", "GOMP_parallel"


@functools.cache
def _share() -> tuple[Any, int]:
    """What keeps ``_SHARE`` in this process, and where it is."""
    return load_text(_SHARE, "share")
