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

_HEAD = 6
"""Numbers before the cells; see ``_share``."""


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
        head = struct.pack(f"{_HEAD}Q", number, count, entry.address, rows, len(packed) // 8, 0)
        data = ctypes.create_string_buffer(head + packed * threads, len(head) + len(packed) * threads)
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
    """What every thread of a team runs: the kernel, with cells of its own. And what keeps that in this process, first.

    It is given an array of 64-bit numbers: addresses of two functions of OpenMP's and of the kernel, the rows, how many
    cells a thread has, a place for what a kernel says that failed, and each thread's cells, the last three a ``Part``.
    """
    from llvmlite import ir

    whole, number = ir.IntType(64), ir.IntType(32)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [whole.as_pointer()]), "share")
    builder = ir.IRBuilder(function.append_basic_block())

    def at(place: Any) -> Any:
        return builder.gep(function.args[0], [place])

    def called(place: int, *arguments: Any) -> Any:
        kind = ir.FunctionType(number, [argument.type for argument in arguments])
        address = builder.inttoptr(builder.load(at(whole(place))), kind.as_pointer())
        return builder.zext(builder.call(address, arguments), whole)

    thread, count = called(0), called(1)
    rows, size = (builder.load(at(whole(place))) for place in (3, 4))
    own = builder.add(whole(_HEAD), builder.mul(thread, size))
    next_first = builder.mul(rows, builder.add(thread, whole(1)))
    part = thread, builder.udiv(builder.mul(rows, thread), count), builder.udiv(next_first, count)
    for place, value in zip((-3, -2, -1), part, strict=True):
        builder.store(value, at(builder.add(builder.add(own, size), whole(place))))
    unused = builder.alloca(whole)
    status = called(2, unused, unused, at(own))
    with builder.if_then(builder.icmp_unsigned("!=", status, whole(0))):
        builder.store(status, at(whole(5)))
    builder.ret_void()
    return load_text(str(module), "share")
