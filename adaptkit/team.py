"""Kernels whose rows are divided among the threads in which torch multiplies matrices.

Threads of our own would have to wait for a processor: after a product, torch's threads spin for a while, waiting for
the next one. They belong to OpenMP; torch's builds for Linux use GNU's library, whose ``GOMP_parallel`` calls a
function in all threads of the team with one address. There it finds these 64-bit numbers:

    number, count    addresses of omp_get_thread_num and omp_get_num_threads
    kernel           address of the kernel's machine code
    rows             number of rows to divide
    useful           number of threads that get rows. The whole team runs regardless: a team of another size would end
                     or start threads, and so would torch's next product
    size             number of cells per thread
    failed           nonzero if a kernel failed
    cells            for each useful thread the kernel's arguments (see ``compiled``), the last of which is its ``Part``

Without GNU's library, and in a forked process, which has no OpenMP threads, the calling thread runs the whole kernel.
"""

import ctypes
import functools
import inspect
import math
import os
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from adaptkit.compiled import Kernel, load_text
from adaptkit.kernel_cache import Kind

_HEAD = ("number", "count", "kernel", "rows", "useful", "size", "failed")
_FUNCTIONS = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_parallel")

_MIN_TEAM_ELEMENTS, _MIN_THREAD_ELEMENTS = 1 << 18, 1 << 14
"""Elements required to use a team, and for each of its threads: on a busy machine a team waits for its last thread."""

_lock = threading.Lock()
_made: list[tuple[Any, int]] = []
_process = {"is_fork": False}


class Part(NamedTuple):
    """The range of rows that one thread computes.

    Attributes:
        thread: number of the thread, from 0.
        first: first row.
        last: one past the last row.
    """

    thread: int
    first: int
    last: int


_PART = Part, ("q", "q", "q")
"""The kind of a ``Part``, which every call has: determining it each time would take microseconds."""


class Shared(Kernel):
    """A kernel that returns nothing and is run in parts; no part may read or write what another part writes.

    The function takes one more argument than its callers pass: the last one is the ``Part`` to compute.

    Args:
        function: the Python function to compile.
        divided: name of the argument whose first axis is the rows.
    """

    def __init__(self, function: Callable[..., Any], divided: str) -> None:
        super().__init__(function, {})
        self._divided = list(inspect.signature(function).parameters).index(divided)

    def _load(self, kinds: tuple[Kind, ...]) -> Any:
        entry = super()._load(kinds)
        if entry.returns:  # ``run`` has no memory for results
            raise TypeError(f"{self.function.__qualname__} is shared and must return nothing")
        return entry

    def __call__(self, *arguments: Any, threads: int | None = None) -> None:
        """Run the kernel, with a number of threads that depends on the number of elements.

        Args:
            arguments: all arguments but the part.
            threads: maximum number of threads, at most ``team_size()``; None for ``team_size()``.
        """
        shape = arguments[self._divided].shape
        rows, size = shape[0], math.prod(shape)
        entry, cells = self._prepare(arguments, _PART)
        cells += 0, 0, rows
        useful = min(rows, size // _MIN_THREAD_ELEMENTS) if size >= _MIN_TEAM_ELEMENTS else 1
        if useful > 1:
            useful = min(useful, team_size() if threads is None else threads)
        if useful > 1:
            run(entry.address, entry.pack(*cells), rows, useful)
        else:
            entry.run(cells)


def shared(divided: str) -> Callable[[Callable[..., Any]], Shared]:
    """Decorate a kernel whose rows are divided among threads; see ``Shared``."""
    return lambda function: Shared(function, divided)


def run(kernel: int, cells: bytes, rows: int, useful: int) -> None:
    """Run a kernel in torch's threads; the rows are divided among the first ``useful`` threads.

    Args:
        kernel: address of the kernel's machine code.
        cells: packed arguments, with space for a ``Part`` at the end.
        rows: number of rows.
        useful: number of threads that get rows, at most ``team_size()``.

    Raises:
        SystemError: the kernel failed.
    """
    number, count, parallel = _openmp()
    head = struct.pack(f"{len(_HEAD)}Q", number, count, kernel, rows, useful, len(cells) // 8, 0)
    data = ctypes.create_string_buffer(head + cells * useful, len(head) + len(cells) * useful)
    _, share = _thread_function()
    parallel(share, data, 0, 0)  # 0: as many threads as OpenMP is set to use
    status = struct.unpack_from(f"{len(_HEAD)}Q", data)[_HEAD.index("failed")]
    if status:
        raise SystemError(f"a kernel failed ({status})")


def team_size() -> int:
    """Return the number of threads that kernels can use: that of torch's products, or 1 where they cannot be shared."""
    threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return 1 if threads is None or _process["is_fork"] or _openmp() is None else int(threads())


def load_team() -> None:
    """Compile what the threads of a team run, which the first kernel that uses one would do otherwise."""
    if team_size() > 1:
        _thread_function()


def is_faster_than_torch() -> bool:
    """Return whether one pass of a kernel beats several of torch: kernels use torch's threads, or it has at most 2."""
    return team_size() > 1 or sys.modules["torch"].get_num_threads() <= 2


@functools.cache
def _openmp() -> Any:
    """Return the addresses of the first two ``_FUNCTIONS``, and the third as a callable; None if they are not loaded.

    Call it only after torch is loaded, since the result is cached.
    """
    loaded = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not all(hasattr(loaded, name) for name in _FUNCTIONS):
        return None
    os.register_at_fork(after_in_child=lambda: _process.update(is_fork=True))
    *known, parallel = (getattr(loaded, name) for name in _FUNCTIONS)
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return *(ctypes.cast(function, ctypes.c_void_p).value for function in known), parallel


def _thread_function() -> tuple[Any, int]:
    """Return the engine that keeps the function of ``_thread_function_ir`` loaded, and its address; cached."""
    with _lock:
        if not _made:
            _made.append(load_text(_thread_function_ir(), "share"))
    return _made[0]


def _thread_function_ir() -> str:
    """Return the LLVM IR of the function that every thread of a team runs."""
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
    useful = builder.select(builder.icmp_unsigned("<", team, useful), team, useful)  # OpenMP may start fewer threads
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
