"""Threads are as many as processors may be used, and leave them to others while they wait; limits of memory count."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from adaptkit.machine import _time_limits, available_memory

CHOSEN = "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
COUNT = "from adaptkit.machine import processor_count, share_processors; share_processors(); print(processor_count())"
LOADED = "import sys, torch; print(torch.get_num_threads())"


def printed(*code, environment=None, before="", **settings):
    """Run code in a new process without variables that say how many threads to start, and return its last line."""
    clean = {name: value for name, value in os.environ.items() if name not in CHOSEN} | (environment or {})
    command = [sys.executable, "-c", before + "\n".join(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean, **settings)
    return done.stdout.split("\n")[-2]


def files(root, written):
    """Write files below a folder that stands for the root of the file system."""
    for name, text in written.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(text))
    return root


SECOND = "sys/fs/cgroup/{}cpu.max"
FIRST = "sys/fs/cgroup/cpu/{}cpu.cfs_{}_us"


@pytest.mark.parametrize(
    ("membership", "written", "limits"),
    [
        ("0::/\n", {SECOND.format(""): "250000 100000\n"}, [2.5]),
        ("0::/\n", {SECOND.format(""): "max 100000\n"}, []),
        ("0::/pod/box\n", {SECOND.format("pod/box/"): "max 100000\n", SECOND.format("pod/"): "50000 100000\n"}, [0.5]),
        ("0::/a/b\n", {SECOND.format("a/b/"): "400000 100000\n", SECOND.format("a/"): "300000 100000\n"}, [4, 3]),
        ("0::/docker/1f\n", {SECOND.format(""): "150000 50000\n"}, [3]),
        ("0::/../..\n", {}, []),
        ("3:cpuset:/\n2:cpu,cpuacct:/d/1f\n1:cpuacct:/\n0::/\n", {FIRST.format("", "quota"): "150000\n"}, []),
        (
            "3:cpuset:/\n2:cpu,cpuacct:/d/1f\n1:name=systemd:/\n0::/\n",
            {FIRST.format("", "quota"): "150000\n", FIRST.format("", "period"): "100000\n"},
            [1.5],
        ),
        ("1:cpu:/\n", {FIRST.format("", "quota"): "-1\n", FIRST.format("", "period"): "100000\n"}, []),
        ("", {}, []),
        ("0::/a\rb\u2028c\udcff\n", {SECOND.format("a\rb\u2028c\udcff/"): "50000 100000\n"}, [0.5]),
        ("0::/a:b\n", {SECOND.format("a:b/"): "50000 100000\n"}, [0.5]),
        ("0::\nunknown\n", {SECOND.format(""): "50000 100000\n"}, [0.5]),
    ],
)
def test_the_limits_of_control_groups_are_found(membership, written, limits, tmp_path):
    assert list(_time_limits(files(tmp_path, {"proc/self/cgroup": membership} | written))) == limits


STAT = "total_rss 700\ntotal_shmem 50\ntotal_cache 9000\n"


@pytest.mark.parametrize(
    ("membership", "written", "left"),
    [
        ("0::/\n", {}, 5 * 2**20),
        ("0::/\n", {"memory.max": "max\n"}, 5 * 2**20),
        ("0::/\n", {"memory.max": "1000\n", "memory.stat": "anon 300\nfile 9000\nshmem 10\n"}, 690),
        ("0::/pod/box\n", {"pod/memory.max": "500\n", "pod/memory.stat": "anon 700\n"}, 0),
        ("4:memory:/d\n", {"memory/d/memory.limit_in_bytes": "1000\n", "memory/d/memory.stat": STAT}, 250),
        ("4:memory:/d\n", {"memory/memory.limit_in_bytes": "1000\n", "memory/memory.stat": STAT}, 250),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 5 * 2**20),
        ("4:cpu:/\n", {"memory/memory.limit_in_bytes": "1000\n"}, 5 * 2**20),
    ],
)
def test_available_memory_is_the_least_that_machine_and_groups_leave(membership, written, left, tmp_path):
    known = {"proc/self/cgroup": membership, "proc/meminfo": "MemTotal: 9999 kB\nMemAvailable: 5120 kB\n"}
    assert (
        available_memory(files(tmp_path, known | {f"sys/fs/cgroup/{name}": written[name] for name in written})) == left
    )


def test_without_the_kernels_files_available_memory_is_unknown(tmp_path):
    assert available_memory(tmp_path) is None


@contextmanager
def control_group(controller):
    """Make a control group; skip the test where that is not permitted."""
    group = Path("/sys/fs/cgroup") / controller / f"adaptkit-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"control groups of version 1 cannot be made here: {error}")
    try:
        yield group
    finally:
        for _ in range(100):  # a process leaves its group a moment after it is waited for
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.05)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_a_process_uses_its_share_of_the_processors():
    """OpenMP by itself starts a thread for each processor, whatever the share."""
    with control_group("cpu") as group:
        (group / "cpu.cfs_quota_us").write_text("50000")
        enter = f"open({str(group / 'tasks')!r}, 'w').write('0')\n"
        assert printed(COUNT, before=enter) == "1"
        assert printed(COUNT, LOADED, before=enter) == "1"
        assert printed(COUNT, LOADED, before=enter, environment={"OMP_NUM_THREADS": "2"}) == "2"
        (group / "cpu.cfs_quota_us").write_text("150000")
        assert printed(COUNT, before=enter) == "2"


def test_a_process_has_the_memory_that_its_group_leaves():
    with control_group("memory") as group:
        (group / "memory.limit_in_bytes").write_text(str(400 << 20))
        enter = f"open({str(group / 'tasks')!r}, 'w').write('0')\n"
        code = "from adaptkit.machine import available_memory as left", "print(left())"
        used = "from adaptkit.machine import available_memory as left", "held = b'1' * (200 << 20)", "print(left())"
        assert 350 << 20 < int(printed(*code, before=enter)) <= 400 << 20
        assert 150 << 20 < int(printed(*used, before=enter)) <= 200 << 20


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_a_process_counts_the_processors_it_may_run_on():
    first = min(os.sched_getaffinity(0))
    assert printed(COUNT, preexec_fn=lambda: os.sched_setaffinity(0, {first})) == "1"
    assert printed(COUNT) == str(len(os.sched_getaffinity(0)))


WAITING = """
import ctypes, time, torch
torch.set_num_threads(2)
numbers, used = torch.ones(1 << 17), 0.0
time.sleep(0.1)  # threads of older OpenBLAS spin for some 30 ms after numpy's import
for _ in range(5):
    numbers.add_(1)
    before = time.process_time()
    time.sleep(0.004)
    used += time.process_time() - before
print(used if hasattr(ctypes.CDLL(None), "GOMP_parallel") else "another library")
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_threads_that_wait_for_work_leave_their_processor_to_others():
    """In five waits of 4 ms, OpenMP's threads spin by default."""
    by_default = printed(WAITING)
    if by_default == "another library":
        pytest.skip("this torch does not use GNU's OpenMP")
    as_set = float(printed(COUNT, WAITING))
    assert as_set < float(by_default) / 4


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, "2000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "5"}, "5")],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value,
)
def test_the_program_sets_how_long_threads_wait_unless_the_user_did(chosen, spins, tmp_path):
    """Before torch is loaded; OpenMP reads it once."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "atexit.register(lambda: print('at the end:', os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules))\n"
    )
    code = "import sys; sys.argv = ['adaptkit', '--version']; from adaptkit.cli.main import main; main()"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    assert printed(code, environment=chosen | {"PYTHONPATH": path}) == f"at the end: {spins} False"
