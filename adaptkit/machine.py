"""The processors and the memory that this process may use, and how torch's threads wait for each other.

Sources: the kernel's documentation of control groups, by which containers are limited (``cpu.max``, ``memory.max``; in
version 1 ``cpu.cfs_quota_us``, ``memory.limit_in_bytes``), and of GNU's OpenMP, which torch uses.
"""

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_SPINS = 2000
"""Iterations, of 20 to 50 ns each, in which a thread of OpenMP waits for work before it sleeps.

A training step has few gaps this long. OpenMP's default, 300,000, is longer than the scheduler's time slice: where
other programs need the same processors, threads spend their slices waiting for threads that wait for a processor.
"""


def share_processors() -> None:
    """Let torch start as many threads as it has processors, and wait in a way that leaves them to other programs.

    Call it before torch is loaded, because OpenMP reads these variables once. What the user set is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))
    if processor_count() < _allowed():  # OpenMP knows the processors of the process, but not its share of their time
        os.environ.setdefault("OMP_NUM_THREADS", str(processor_count()))


@functools.cache
def processor_count() -> int:
    """Return the number of processors that this process may use, at least 1.

    Fewer than it may run on where control groups limit its time (``docker --cpus``); a fraction counts as one.
    """
    return max(1, min([_allowed(), *map(math.ceil, _time_limits(Path("/")))]))


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process could still use without swapping; None if the system does not say.

    Less than that of the machine where control groups limit it (``docker --memory``). Cached pages count as available.
    """
    free = _fields(root / "proc/meminfo").get("MemAvailable:")
    found = [] if free is None else [1024 * free]
    return min([*found, *_memory_left(root)], default=None)


def _allowed() -> int:
    """Return the number of processors that the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _time_limits(root: Path) -> Iterator[float]:
    """Yield the limits of this process's control groups, in processors."""
    for folder, is_first_version in _groups(root, "cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_first_version else ("cpu.max",)
        share = " ".join(_read(folder / name) for name in names).split()
        if len(share) == 2 and all(number.isdecimal() for number in share):  # without a limit, -1 or max
            yield int(share[0]) / int(share[1])


def _memory_left(root: Path) -> Iterator[int]:
    """Yield the bytes left in each of this process's control groups that has a limit."""
    for folder, is_first_version in _groups(root, "memory"):
        limit = _read(folder / ("memory.limit_in_bytes" if is_first_version else "memory.max")).strip()
        if limit.isdecimal():  # without a limit, max or 2^63
            used = _fields(folder / "memory.stat")
            names = ("total_rss", "total_shmem") if is_first_version else ("anon", "shmem")
            yield max(0, int(limit) - sum(used.get(name, 0) for name in names))


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folder of each control group that this process is in, and whether it is of version 1.

    A container sees its own group at the top, whatever its path on the host.
    """
    for line in _read(root / "proc/self/cgroup").split("\n"):  # a path may hold any other separator of lines
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and (not controllers or controller in controllers.split(",")):
            top = root / "sys/fs/cgroup" / (controller if controllers else "")
            group = PurePosixPath(path.lstrip("/"))
            for place in (group, *group.parents):
                yield top / place, bool(controllers)


def _fields(file: Path) -> dict[str, int]:
    """Return the numbers of a file whose lines are names and numbers."""
    lines = (line.split() for line in _read(file).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _read(file: Path) -> str:
    """Return the text of a file, which may hold names of files; an empty one if it cannot be read."""
    try:
        return os.fsdecode(file.read_bytes())
    except OSError:
        return ""
