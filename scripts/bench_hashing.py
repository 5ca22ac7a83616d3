"""Measure the cost of hashing: verify against plain sha256 of the same files, and its share in quantize and merge.

    .venv/bin/python scripts/bench_hashing.py verify|share [--rounds 5]

The checkpoint is that of ``bench.py``: 1.1 billion parameters, bfloat16, five shards, 2.2 GB. The sides of a comparison
alternate, each as a process, with the files in the page cache. Medians are printed, and, since a machine may be busy,
also the best times and CPU times of each side.

``verify`` compares with plain sha256 in Python, one file per thread, the largest first, and with ``sha256sum``, one
process per file; rates are given for the whole process, and for its work without startup. ``share`` runs each operation
unchanged, and with all hashes replaced by no-ops, which makes the manifest meaningless; all else is the same.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench

PLAIN = """
import hashlib, os, sys, time
from concurrent.futures import ThreadPoolExecutor
begun = time.perf_counter()
files = sorted((f for f in os.scandir(sys.argv[1]) if f.is_file()), key=lambda f: -f.stat().st_size)
def work(entry):
    with open(entry.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
with ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(work, files))
print(time.perf_counter() - begun)
"""

VERIFY = """
import sys, time
from pathlib import Path
from adaptkit.operations.verify import verify
begun = time.perf_counter()
verify(Path(sys.argv[1]))
print(time.perf_counter() - begun)
"""

OPERATION = """
import sys
from adaptkit.checkpoint import adapter, hashing, writer
from adaptkit.operations._merge import merging
from adaptkit.operations._quantize import plan

class Nothing:
    def __init__(self, *_): pass
    def update(self, _): pass
    def reset(self): pass
    def hexdigest(self): return "0" * 32

class Hashes:
    sha256 = xxh3_128 = Nothing
    @staticmethod
    def xxh3_128_hexdigest(_): return "0" * 32

if sys.argv.pop(1) == "without":
    writer.hashlib = writer.xxhash = hashing.xxhash = adapter.xxhash = plan.xxhash = merging.xxhash = Hashes
from adaptkit.cli.main import main
main()
"""


def seconds(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return the seconds of the process, those that it reports for its work, and its CPU seconds."""
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=told)
        _, status, usage = os.wait4(process.pid, 0)
        whole = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"bench: {command[:3]} failed")
        told.seek(0)
        text = told.read()
    work = float(text) if text.count("\n") == 1 else whole
    return whole, work, usage.ru_utime + usage.ru_stime


def in_turn(sides: dict[str, list[str]], rounds: int, out: Path | None = None) -> dict[str, list[tuple[float, ...]]]:
    """Run all sides alternately; the first round, which fills the page cache, is not counted."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, command in sides.items():
            if out is not None:
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
            measured = seconds(command)
            found[name] += [measured] if number else []
    return found


def bench_verify(rounds: int) -> None:
    """Print the rates of verify and of plain sha256."""
    artifact = bench.FOLDER / "verified"
    lora = bench.random_adapter("hashed-adapter", 2048, 5632)
    shutil.rmtree(artifact, ignore_errors=True)
    merge = [*bench.ADAPTKIT, "merge", str(bench.checkpoint()), str(lora), "-o", str(artifact), "--no-undo", "--quiet"]
    subprocess.run(merge, check=True)
    nbytes = sum(path.stat().st_size for path in artifact.iterdir())
    each = f"ls -S '{artifact}'/* | xargs -P {os.cpu_count()} -n 1 sha256sum"
    sides = {
        "sha256 alone, in Python": [sys.executable, "-c", PLAIN, str(artifact)],
        "sha256sum, a process a file": ["sh", "-c", each],
        "adaptkit's verify": [sys.executable, "-c", VERIFY, str(artifact)],
        "adaptkit verify, the command": [*bench.ADAPTKIT, "verify", str(artifact)],
    }
    found = in_turn(sides, rounds)
    print(
        f"{nbytes / 1e9:.2f} GB in {len(list(artifact.iterdir()))} files; rates in GB/s, and of plain sha256 in Python"
    )
    print(f"{'':30} {'process, median':>18} {'best':>16} {'work alone, best':>18} {'a CPU second':>16}")
    columns = {
        name: [
            nbytes / 1e9 / value
            for value in (
                statistics.median(whole for whole, _, _ in runs),
                min(whole for whole, _, _ in runs),
                min(work for _, work, _ in runs),
                min(cpu for _, _, cpu in runs),
            )
        ]
        for name, runs in found.items()
    }
    plain = columns["sha256 alone, in Python"]
    for name, rates in columns.items():
        cells = [f"{rate:8.2f} {100 * rate / other:5.1f} %" for rate, other in zip(rates, plain, strict=True)]
        print(f"{name:30} {'  '.join(cells)}")
    shutil.rmtree(artifact)


def bench_share(rounds: int) -> None:
    """Print how much time hashing adds to quantize and merge."""
    model, out = str(bench.checkpoint()), bench.FOLDER / "out"
    lora = str(bench.random_adapter("hashed-adapter", 2048, 5632))
    commands = {
        "quantize": ["quantize", model, "-o", str(out), "--quiet"],
        "merge": ["merge", model, lora, "-o", str(out), "--quiet"],
        "merge --no-undo": ["merge", model, lora, "-o", str(out), "--quiet", "--no-undo"],
    }
    print(f"seconds, with and without hashes, and what they add\n{'':16} {'median':>24} {'best':>24} {'CPU, best':>24}")
    for name, command in commands.items():
        sides = {side: [sys.executable, "-c", OPERATION, side, *command] for side in ("with", "without")}
        one, two = in_turn(sides, rounds, out).values()
        pairs = [
            [statistics.median(whole for whole, _, _ in runs) for runs in (one, two)],
            [min(whole for whole, _, _ in runs) for runs in (one, two)],
            [min(cpu for _, _, cpu in runs) for runs in (one, two)],
        ]
        cells = [f"{a:7.2f} {b:7.2f} {100 * (a / b - 1):5.1f} %" for a, b in pairs]
        print(f"{name:16} {'  '.join(cells)}", flush=True)
        shutil.rmtree(out)


def main() -> None:
    """Run one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["verify", "share"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    Path(bench.FOLDER).mkdir(parents=True, exist_ok=True)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, {options.rounds} rounds")
    {"verify": bench_verify, "share": bench_share}[options.what](options.rounds)


if __name__ == "__main__":
    main()
