"""Check that memory, handles and threads do not grow during long training and many merges.

    .venv/bin/python scripts/soak.py [--steps 2000] [--cycles 200] [--json]

Prints a table of samples, and exits with 1 if, after the first quarter of either, resident memory grew by more than
8 MiB, or the number of handles or threads grew.
"""

import argparse
import filecmp
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "fixtures")]

import tiny  # noqa: E402

from adaptkit.operations.merge import merge  # noqa: E402
from adaptkit.operations.quantize import quantize  # noqa: E402
from adaptkit.operations.unmerge import unmerge  # noqa: E402
from adaptkit.training.config import TrainConfig  # noqa: E402
from adaptkit.training.loop import train  # noqa: E402

ALLOWED_BYTES = 8 << 20
SAMPLES = 20


@dataclass(frozen=True)
class Sample:
    """Resources that this process uses.

    Attributes:
        at: step or cycle.
        resident_bytes: resident memory.
        handles: number of open files.
        threads: number of threads.
    """

    at: int
    resident_bytes: int
    handles: int
    threads: int


def sample(at: int) -> Sample:
    """Measure the resources of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE")
    return Sample(at, memory, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


def soak_training(root: Path, base: Path, steps: int) -> list[Sample]:
    """Train a tiny model for many steps, with checkpoints and evaluations in between."""
    quantize(base, root / "nf4")
    rows = tiny.write_instructions(root / "rows.jsonl", rows=64)
    config = TrainConfig(
        str(root / "nf4"), (str(rows),), rank=4, steps=steps, batch_size=2, micro_batch_size=1, device="cpu",
        compute_dtype="float32", save_every=max(1, steps // 40), eval_every=max(1, steps // 20), page_kib=4,
        optimizer_pages_mib=0.01,
    )  # fmt: skip
    found, every = list[Sample](), max(1, steps // SAMPLES)
    train(config, root / "trained", on_step=_every(every, found))
    return found


def _every(every: int, found: list[Sample]) -> Callable[[object], None]:
    count = 0

    def told(report: object) -> None:
        nonlocal count
        count += 1
        if count % every == 0:
            found.append(sample(count))

    return told


def soak_merging(root: Path, base: Path, cycles: int) -> list[Sample]:
    """Merge and unmerge an adapter repeatedly, each time into the result of the last cycle."""
    adapter = tiny.write_peft_adapter(root / "adapter", base)
    current, found = base, list[Sample]()
    for cycle in range(1, cycles + 1):
        merge(current, [adapter], root / "merged")
        unmerge(root / "merged", [adapter], root / f"base-{cycle}")
        shutil.rmtree(root / "merged")
        if current != base:
            shutil.rmtree(current)
        current = root / f"base-{cycle}"
        if cycle % max(1, cycles // SAMPLES) == 0:
            found.append(sample(cycle))
    names = sorted(path.name for path in base.iterdir())
    _, different, lost = filecmp.cmpfiles(base, current, names, shallow=False)
    if different or lost:
        raise SystemExit(f"soak: after {cycles} cycles these differ from the base: {different + lost}")
    return found


def problems(found: list[Sample]) -> list[str]:
    """Return the resources that grew after the first quarter."""
    settled, last = found[len(found) // 4 :], found[-1]
    wrong = []
    grown = max(s.resident_bytes for s in settled) - settled[0].resident_bytes
    if grown > ALLOWED_BYTES:
        wrong.append(f"memory grew by {grown / 2**20:.1f} MiB")
    for name in ("handles", "threads"):
        before, after = getattr(settled[0], name), getattr(last, name)
        if after > before:
            wrong.append(f"{name} grew from {before} to {after}")
    return wrong


def main() -> int:
    """Run both, and print a report."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--cycles", type=int, default=200, help="of merge and unmerge")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="soak-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        root = Path(folder)
        base = tiny.write_llama(root / "base")
        runs = {"training steps": soak_training(root, base, options.steps)}
        runs["merge cycles"] = soak_merging(root, base, options.cycles)
    wrong = {name: problems(found) for name, found in runs.items()}
    if options.json:
        samples = {name: [asdict(s) for s in found] for name, found in runs.items()}
        print(json.dumps({"samples": samples, "problems": wrong}))
    else:
        print(f"{'':<16} {'at':>5} {'resident MiB':>12} {'handles':>7} {'threads':>7}")
        for name, found in runs.items():
            for s in found[:: max(1, len(found) // 5)] + found[-1:]:
                print(f"{name:<16} {s.at:>5} {s.resident_bytes / 2**20:>12.1f} {s.handles:>7} {s.threads:>7}")
            print(f"{name:<16} {'; '.join(wrong[name]) or 'flat'}")
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
