"""Time trainings that share the processors with others, with the command's setting for waiting threads and without.

    .venv/bin/python scripts/bench_sharing.py [--steps 12] [--runs 2]

Each training is ``adaptkit train`` on SmolLM2-135M-Instruct, with a thread for each processor. ``default`` is OpenMP's
own number of spins; see ``adaptkit/machine.py``. Seconds are those from the start of the commands until all have ended.
The adapters' bytes must not depend on the setting.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import get_smollm2
from bench_training import packed_base

from adaptkit.checkpoint.hashing import file_sha256

ADAPTER, DEFAULT = "adapter_model.safetensors", {"GOMP_SPINCOUNT": "300000"}
CHOSEN = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def train(base: Path, data: Path, work: Path, steps: int, runs: int, setting: dict[str, str]) -> tuple[float, set[str]]:
    """Train ``runs`` times at once; return the seconds until all have ended, and the digests of the adapters."""
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN} | setting
    outputs = [work / str(number) for number in range(runs)]
    command = [
        sys.executable, "-m", "adaptkit", "train", "--base", str(base), "--data", str(data), "--force", "--quiet",
        "--steps", str(steps), "--batch-size", "1", "--max-length", "256", "--device", "cpu",
    ]  # fmt: skip
    started = time.monotonic()
    running = [subprocess.Popen([*command, "-o", str(output)], env=environment) for output in outputs]
    if any([process.wait() for process in running]):
        sys.exit("bench: a training failed")
    return time.monotonic() - started, {file_sha256(output / ADAPTER) for output in outputs}


def main() -> None:
    """Train alone and together, with both settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--runs", type=int, default=2, help="trainings at once")
    options = parser.parse_args()
    made = get_smollm2.make(get_smollm2.default_folder())
    base, data = packed_base(made / get_smollm2.MODEL_NAME), made / "data" / "train.jsonl"
    work, digests = made.parent / "bench-sharing", set[str]()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, {options.steps} steps")
    print(f"\n{'trainings at once':20} {'adaptkit':>10} {'default':>10} {'ratio':>7}")
    try:
        for runs in (1, options.runs):
            seconds = []
            for setting in ({}, DEFAULT):
                taken, found = train(base, data, work, options.steps, runs, setting)
                seconds.append(taken)
                digests |= found
            print(f"{runs:<20} {seconds[0]:8.1f} s {seconds[1]:8.1f} s {seconds[0] / seconds[1]:7.2f}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if len(digests) != 1:
        sys.exit("bench: the adapters differ")


if __name__ == "__main__":
    main()
