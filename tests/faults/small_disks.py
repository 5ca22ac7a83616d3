"""Run commands on a disk that is too small, and on a read-only one; then repair the disk and run them again.

    unshare --user --map-root-user --mount python small_disks.py FOLDER

The disk is a tmpfs, so the errors are those of the system; it vanishes with the process. Prints one JSON document: for
each command, how often it failed as expected, and a list of problems.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import INPUTS, JOBS, Job, result, too_early, tree, write_sources

ELSEWHERE = ("publish", "pull", "run")
FRACTIONS = (0.3, 0.9)
"""Sizes of the disk, as fractions of the output's size."""
PAGE, PLENTY, NO_HUB = 4096, 1 << 26, Path("nowhere")


class Bench:
    """Runs jobs on small and read-only disks."""

    def __init__(self, folder: Path, run: Callable[..., Any]) -> None:
        self.folder, self.run, self.inputs = folder, run, folder / "inputs"
        write_sources(self.inputs)
        for command in INPUTS:
            self._give(command.replace("{in}", str(self.inputs)).split(), folder)

    def refusals(self, job: Job) -> tuple[int, list[str]]:
        """Return how often a job failed as expected, and a list of problems."""
        sound = self.folder / f"{job.name} sound"
        job.prepare(self.inputs, sound)
        old = tree(sound)
        self._give(job.argv(self.inputs, sound), sound)
        expected = result(job, sound, NO_HUB)
        pages = [math.ceil(len(content) / PAGE) for content in expected.values()]
        sizes = [int(sum(pages) * fraction) * PAGE for fraction in FRACTIONS]
        refused, problems = 0, []
        for number, size in enumerate([*sizes, None]):
            trial = self.folder / f"{job.name} {number}"
            trial.mkdir()
            _mount(trial, "size", PLENTY)
            job.prepare(self.inputs, trial)
            used = sum(math.ceil(len(content) / PAGE) for content in old.values()) * PAGE
            _mount(trial, "remount,ro" if size is None else "remount,size", None if size is None else size + used)
            done = self.run(*job.argv(self.inputs, trial), cwd=trial)
            refused += done.code == (2 if size is None else 1)
            lines = done.stderr.splitlines()
            said = ["Read-only file system"] if size is None else ["No space left on device", "but its disk has"]
            if done.code not in (1, 2) or not lines[0].startswith("error: ") or not any(w in lines[0] for w in said):
                problems.append(f"{trial.name}: ended with {done.code}: {done.stderr}")
            if len(lines) != 2 or not lines[1].startswith("hint: "):
                problems.append(f"{trial.name}: one line and a hint, not {done.stderr}")
            problems += [f"{trial.name}: {name} is there" for name in too_early(job, trial, NO_HUB, expected, old)]
            _mount(trial, "remount,rw,size", PLENTY)
            done = self.run(*job.argv(self.inputs, trial), cwd=trial)
            if done.code or result(job, trial, NO_HUB) != expected:
                problems.append(f"{trial.name}: not the same afterwards ({done.code}: {done.stderr})")
        return refused, problems

    def _give(self, arguments: list[str], folder: Path) -> None:
        done = self.run(*arguments, cwd=folder)
        if done.code:
            raise RuntimeError(done.stderr)


def _mount(folder: Path, option: str, size: int | None) -> None:
    options = option if size is None else f"{option}={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def main() -> None:
    from command_line import CommandLine

    with CommandLine() as run:
        bench = Bench(Path(sys.argv[1]), run)
        print(json.dumps({job.name: bench.refusals(job) for job in JOBS if job.name not in ELSEWHERE}))


if __name__ == "__main__":
    main()
