"""Compare whole commands of two revisions: seconds, processor seconds and peak memory, before and after.

    .venv/bin/python scripts/bench_revisions.py main~3 main [--rounds 3] [--large] [quantize merge ...]

Each revision is checked out into a temporary worktree. Each command first runs once on
either side uncounted, so that kernels are compiled and files are in the page cache. Then the sides alternate in each
round, the first one first in every other. Printed are medians, and the ratio of before to after: above 1, it became
better. The checkpoint is the random Llama of ``bench.py``, with 1.1 billion parameters, or with ``--large`` that of
``bench_large.py``, with 7.4 billion; adapters have rank 16 on all linear layers. ``train`` makes a few steps of
SmolLM2-135M, of 1024 tokens each. The large one needs 45 GB in the user's cache folder, of which it keeps 15.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bench
import bench_large
import get_smollm2

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = ("quantize", "merge", "unmerge", "verify", "train", "help")
FIGURES = ("seconds", "processor s", "peak MB")


@dataclass(frozen=True)
class Side:
    """A revision's worktree."""

    source: Path

    def run(self, arguments: list[str]) -> tuple[float, float, float]:
        """Run a command; return its seconds, processor seconds, and peak megabytes (of the largest process)."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"PYTHONPATH": str(self.source)}
        os.sync()
        started = time.monotonic()
        with tempfile.TemporaryFile("w+") as errors:
            command = [*bench.ADAPTKIT, *arguments]
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, env=environment, cwd=self.source
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                errors.seek(0)
                sys.exit(f"bench: {self.source.name}: {' '.join(arguments)} failed:\n{errors.read()[-2000:]}")
        return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


@contextlib.contextmanager
def checkouts(revisions: list[str], folder: Path) -> Iterator[list[Side]]:
    """Check out revisions into worktrees, which are removed afterwards."""
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    sources = [folder / name for name in ("before", "after")]
    try:
        for source, revision in zip(sources, revisions, strict=True):
            subprocess.run([*git, "add", "--quiet", "--detach", str(source), revision], check=True)
        yield [Side(source) for source in sources]
    finally:
        for source in sources:
            subprocess.run([*git, "remove", "--force", str(source)], check=False)


def large_checkpoint() -> Path:
    """Make the checkpoint of 7.4 billion parameters once, in another process, whose memory would count as ours."""
    model = bench_large.FOLDER / "llama-7.4b"
    if not model.exists():
        bench_large.FOLDER.mkdir(parents=True, exist_ok=True)
        making = multiprocessing.get_context("spawn").Process(target=bench_large.make_checkpoint, args=(model,))
        making.start()
        making.join()
    return model


def arguments_of(name: str, large: bool, first: Side, folder: Path) -> list[str]:
    """Return the arguments of a command; what it needs is made once, by the first side."""
    out, model, made = folder / "out", large_checkpoint() if large else bench.checkpoint(), folder / "made"
    sizes = (bench_large.HIDDEN, bench_large.INNER, 0, bench_large.LAYERS, bench_large.KEYS)
    lora = bench.random_adapter("adapter-large", *sizes) if large else bench.adapter()
    shutil.rmtree(made, ignore_errors=True)
    if name == "unmerge":
        first.run(["merge", str(model), str(lora), "-o", str(made)])
        return ["unmerge", str(made), "--adapter", str(lora), "-o", str(out)]
    if name == "train":
        smollm2 = get_smollm2.make(get_smollm2.default_folder())
        first.run(["quantize", str(smollm2 / get_smollm2.MODEL_NAME), "-o", str(made)])
        data = ["--data", str(smollm2 / "data" / "train.jsonl"), "--pack", "--batch-size", "1", "--max-length", "1024"]
        return ["train", "--base", str(made), *data, "--held-out", "0", "--steps", "6", "-o", str(out)]
    simple = {"quantize": ["quantize", str(model), "-o", str(out)], "verify": ["verify", str(lora)], "help": ["--help"]}
    return (simple | {"merge": ["merge", str(model), str(lora), "-o", str(out)]})[name]


def compare(name: str, arguments: list[str], sides: list[Side], rounds: int, out: Path) -> None:
    """Run a command on both sides in turn, and print a row for each figure."""
    found: list[list[tuple[float, float, float]]] = [[], []]
    for turn in range(1 + rounds):
        for side in (0, 1) if turn % 2 else (1, 0):
            shutil.rmtree(out, ignore_errors=True)
            measured = sides[side].run(arguments)
            if turn:
                found[side].append(measured)
    shutil.rmtree(out, ignore_errors=True)
    before, after = ([statistics.median(column) for column in zip(*runs, strict=True)] for runs in found)
    for figure, old, new in zip(FIGURES, before, after, strict=True):
        print(f"{name:10} {figure:12} {old:9.2f} {new:9.2f} {old / new:8.3f}", flush=True)


def main() -> None:
    """Compare the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs=2, metavar="REVISION")
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"{', '.join(COMMANDS)}; default: the first two")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="7.4 billion parameters instead of 1.1")
    options = parser.parse_intermixed_args()
    if unknown := set(options.commands) - set(COMMANDS):
        parser.error(f"no such command: {', '.join(sorted(unknown))}")
    bench.FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bench.FOLDER) as place, checkouts(options.revisions, Path(place)) as sides:
        print(f"{'':10} {'':12} {'before':>9} {'after':>9} {'ratio':>8}")
        for name in options.commands or COMMANDS[:2]:
            arguments = arguments_of(name, options.large, sides[0], Path(place))
            compare(name, arguments, sides, options.rounds, Path(place) / "out")


if __name__ == "__main__":
    main()
