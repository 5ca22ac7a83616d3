"""The processors that this process may use, and how torch's threads wait for each other.

Sources: the kernel's documentation of control groups (``cpu.max`` of version 2, ``cpu.cfs_quota_us`` of version 1), and
the manual of GNU's OpenMP library, which torch's builds for Linux use.
"""

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_SPINS = 2000
"""Iterations, of 20 to 50 ns each, in which a thread of OpenMP waits for work before it sleeps.

A training step has few gaps this long. Its default, 300,000, is longer than the scheduler's time slice: where other
programs need the same processors, threads spend their slices waiting for threads that wait for a processor.
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

    These are the ones it may run on (``taskset``, Slurm), or fewer where control groups limit its time
    (``docker --cpus``, limits of Kubernetes); a fraction of a processor counts as one.
    """
    return max(1, min([_allowed(), *map(math.ceil, _limits(Path("/")))]))


def _allowed() -> int:
    """Return the number of processors that the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _limits(root: Path) -> Iterator[float]:
    """Yield the limits, in processors, of the control groups that this process is in.

    Args:
        root: the file system's. A container sees its own group at the top, whatever its path on the host.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = PurePosixPath(path).relative_to("/")
        for place in (group, *group.parents):
            if controllers:
                folder = root / "sys/fs/cgroup/cpu" / place
                share = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
            else:
                share = _read(root / "sys/fs/cgroup" / place / "cpu.max").split()
            if len(share) == 2 and all(number.isdecimal() for number in share):  # without a limit, max or -1
                yield int(share[0]) / int(share[1])


def _read(file: Path) -> str:
    """Return the text of a file; an empty one if it cannot be read."""
    try:
        return file.read_text()
    except (OSError, UnicodeError):
        return ""
