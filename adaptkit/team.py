"""Kernels whose rows are divided among the threads in which torch multiplies matrices.

Threads of our own would wait for a processor: for some time after a product, torch's keep theirs and look out for the
next one. They are OpenMP's, and in torch's builds for Linux those of GNU's library. That has a function which lets all
threads run another one; this one gets an address, and what is there are 64-bit numbers:

    number, count    addresses of OpenMP's functions that say which thread of how many this is
    kernel           address of a kernel's machine code
    rows             that are to be divided
    useful           how many threads get some; it is the whole team that runs, since one of another size would end
                     threads, or make some, and so would torch's next product
    size             of the cells of a thread
    failed           not zero if a kernel said so
    cells            for each useful thread what the kernel is passed (see ``compiled``), at the end its ``Part``

Where there is no such library, and in a fork, which has no threads but its own, the thread that calls a kernel runs it.
"""

import ctypes
import functools
import inspect
import os
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from adaptkit.compiled import Kernel, load_text

_HEAD = ("number", "count", "kernel", "rows", "useful", "size", "failed")
_FUNCTIONS = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_parallel")

_WORTH, _LEAST = 1 << 18, 1 << 14
"""Elements that are worth a team, and a thread of one: where others want the processors, a team waits for its last."""

_lock = threading.Lock()
_made: list[tuple[Any, int]] = []
_process = {"is_fork": False}


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
    """A kernel that gives nothing, and of which no part reads or writes what another one writes.

    Its function has one argument more than it is called with, the last one: the ``Part`` that it computes.

    Args:
        function: what is compiled.
        divided: the name of the argument whose first axis has the rows.
    """

    def __init__(self, function: Callable[..., Any], divided: str) -> None:
        super().__init__(function, {})
        self._divided = list(inspect.signature(function).parameters).index(divided)

    def __call__(self, *arguments: Any, threads: int | None = None) -> None:
        """Run it, in as many threads as the rows are worth.

        Args:
            arguments: all but the part.
            threads: at most; None: as many as torch's products have.
        """
        array = arguments[self._divided]
        rows = len(array)
        entry, cells = self._prepare((*arguments, Part(0, 0, rows)))
        useful = min(rows, array.size // _LEAST) if array.size >= _WORTH else 1
        if useful > 1:
            useful = min(useful, team_size() if threads is None else threads)
        if useful > 1:
            run(entry.address, entry.pack(*cells), rows, useful)
        else:
            entry(cells)


def shared(divided: str) -> Callable[[Callable[..., Any]], Shared]:
    """Decorate a kernel whose rows are divided among threads; see ``Shared``."""
    return lambda function: Shared(function, divided)


def run(kernel: int, cells: bytes, rows: int, useful: int) -> None:
    """Let torch's threads run a kernel, so many of them for a part of the rows each.

    Args:
        kernel: address of its machine code.
        cells: what it is passed, with room for a ``Part`` at the end.
        rows: to divide.
        useful: at most ``team_size``.

    Raises:
        SystemError: the kernel says that it failed.
    """
    number, count, parallel = _openmp()
    head = struct.pack(f"{len(_HEAD)}Q", number, count, kernel, rows, useful, len(cells) // 8, 0)
    data = ctypes.create_string_buffer(head + cells * useful, len(head) + len(cells) * useful)
    _, share = _share()
    parallel(share, data, 0, 0)  # as many threads as the calling one was told to have
    status = struct.unpack_from(f"{len(_HEAD)}Q", data)[_HEAD.index("failed")]
    if status:
        raise SystemError(f"a kernel failed ({status})")


def team_size() -> int:
    """How many threads kernels may be divided among: those of torch's products, where that can be done; else one."""
    threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return 1 if threads is None or _process["is_fork"] or _openmp() is None else int(threads())


def keeps_up() -> bool:
    """Whether a kernel's one pass is faster than several of torch's: it has their threads, or they are few."""
    return team_size() > 1 or sys.modules["torch"].get_num_threads() <= 2


@functools.cache
def _openmp() -> Any:
    """Addresses of the first two of ``_FUNCTIONS``, and the third to be called; None if they are not loaded.

    Looked for once torch is.
    """
    loaded = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not all(hasattr(loaded, name) for name in _FUNCTIONS):
        return None
    os.register_at_fork(after_in_child=lambda: _process.update(is_fork=True))
    *known, parallel = (getattr(loaded, name) for name in _FUNCTIONS)
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return *(ctypes.cast(function, ctypes.c_void_p).value for function in known), parallel


def _share() -> tuple[Any, int]:
    """What keeps in this process what every thread of a team runs, and the address of that."""
    with _lock:
        if not _made:
            _made.append(load_text(_text(), "share"))
    return _made[0]


def _text() -> str:
    """What every thread of a team runs, in LLVM's language."""
    from llvmlite import ir

    whole, status = ir.IntType(64), ir.IntType(32)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [whole.as_pointer()]), "share")
    builder = ir.IRBuilder(function.append_basic_block())

    def at(place: Any) -> Any:
        return builder.gep(function.args[0], [place])

    def cell(name: str) -> Any:
        return at(whole(_HEAD.index(name)))

    def called(name: str, *arguments: Any) -> Any:
        kind = ir.FunctionType(status, [argument.type for argument in arguments])
        address = builder.inttoptr(builder.load(cell(name)), kind.as_pointer())
        return builder.zext(builder.call(address, arguments), whole)

    thread, team = called("number"), called("count")
    rows, useful, size = (builder.load(cell(name)) for name in ("rows", "useful", "size"))
    useful = builder.select(builder.icmp_unsigned("<", team, useful), team, useful)  # a library may give fewer
    with builder.if_then(builder.icmp_unsigned("<", thread, useful)):
        own = builder.add(whole(len(_HEAD)), builder.mul(thread, size))
        next_first = builder.mul(rows, builder.add(thread, whole(1)))
        part = thread, builder.udiv(builder.mul(rows, thread), useful), builder.udiv(next_first, useful)
        for place, value in zip((-3, -2, -1), part, strict=True):
            builder.store(value, at(builder.add(builder.add(own, size), whole(place))))
        unused = builder.alloca(whole)
        failed = called("kernel", unused, unused, at(own))
        with builder.if_then(builder.icmp_unsigned("!=", failed, whole(0))):
            builder.store(failed, cell("failed"))
    builder.ret_void()
    return str(module)
