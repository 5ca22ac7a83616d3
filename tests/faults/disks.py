"""Simulate disk faults and power cuts during every command; then run the command again and compare every byte.

    disks.py [--cuts 4] [--faults 2] [--seed 1] [--only merge] [--json]

A power cut keeps what was synced, and at random more; see ``powercut.py``. Faults are raised by the calls that would
fail on a real disk. Prints a table, and exits with 1 if anything was lost, incomplete, different or not reported in
one line.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kills import Range, is_done, proving_ground

FAULTS = {
    "no space": (("write", "create", "mkdir", "fsync"), errno.ENOSPC),
    "write error": (("write", "fsync"), errno.EIO),
    "read error": (("read",), errno.EIO),
    "read-only": (("create", "mkdir", "rename", "unlink", "truncate"), errno.EROFS),
    "no temporary space": (("create", "mkdir"), errno.ENOSPC),
}
"""Faults: the kinds of calls that fail from some moment on, and their error; the last only for temporary files."""
TEMPORARY_ONLY = "no temporary space"
CODES = (1, 2, 3, 5, 7)
"""Accepted exit codes: disk error, unwritable path, damaged or unreadable input, and a Hub that does not answer."""


@dataclass
class Tally:
    """Results for one command."""

    cuts: int = 0
    faults: int = 0
    changes: int = 0
    harmless: int = 0
    identical: int = 0
    problems: list[str] = field(default_factory=list)


def fails_from(number: int, kinds: tuple[str, ...], code: int, only: str) -> Any:
    """Return a hook that makes calls of some kinds below a folder fail, from the ``number``-th on."""
    seen = -1

    def hook(call: Any) -> None:
        nonlocal seen
        if call.before and call.kind in kinds and (call.path + os.sep).startswith(only):
            seen += 1
            if seen >= number:
                raise OSError(code, os.strerror(code), call.path)

    return hook


def changes_at(number: int) -> Any:
    """Return a hook that changes the last byte of a weights file before the ``number``-th read of such files."""
    count, low, read, write = -1, os.open, os.pread, os.pwrite  # the originals, not the layer's

    def hook(call: Any) -> None:
        nonlocal count
        if call.before and call.kind == "read" and "-inputs/" in call.path and call.path.endswith(".safetensors"):
            count += 1
            if count == number:
                handle = low(call.path, os.O_RDWR)
                end = os.path.getsize(call.path) - 1
                write(handle, bytes([read(handle, 1, end)[0] ^ 1]), end)
                os.close(handle)

    return hook


class Judge:
    """Disturbs one job and judges the results."""

    def __init__(self, ground: Range, job: Any, chance: random.Random) -> None:
        self.ground, self.job, self.chance, self.tally = ground, job, chance, Tally()
        self.expected, self.calls, _ = ground.undisturbed(job)
        self.old = ground.old(job)

    def cut(self, count: int) -> None:
        """Cut the power at some moments, and after the end, with each possible outcome."""
        from disk import WRITES
        from powercut import OUTCOMES, Disk, cuts_power

        last = 1 + max(call.number for call in self.calls if call.kind in WRITES)
        # After the end, not before a last call by its number: threads of the Hub's client make a few more or fewer.
        for at in [*self.chance.sample(range(last), min(count, last)), None]:
            for outcome in OUTCOMES:
                trial = self.ground.trial(self.job)
                disk, log = Disk(trial), self.ground.scratch.parent / f"cut-{trial.name}.jsonl"
                self.ground.children.run(self._argv(trial), trial, cuts_power(log, at))
                disk.after(log, outcome, self.chance)
                self.tally.cuts += 1
                where = f"{trial.name}: power cut {'after the end' if at is None else f'before call {at}'}, {outcome}"
                self._require_whole(trial, where)
                if at is None and outcome != "torn" and self._result(trial) != self.expected:
                    self.tally.problems.append(f"{where}: its result is gone")
                self._require_same_again(trial, where)

    def fail(self, count: int) -> None:
        """Make the disk fail in each way, from some calls on."""
        from jobs import TEMPORARY

        for name, (kinds, code) in FAULTS.items():
            total = sum(call.kind in kinds for call in self.calls) if "read" not in kinds else 12
            for at in {0, *self.chance.sample(range(total), min(count - 1, total))}:
                trial = self.ground.trial(self.job)
                only = str(trial / TEMPORARY) if name == TEMPORARY_ONLY else str(self.ground.scratch)
                hook = fails_from(at, kinds, code, only + os.sep)
                ended = self.ground.children.run(self._argv(trial), trial, hook)
                where = f"{trial.name}: {name} from call {at} on"
                if ended.code == 0:
                    self.tally.harmless += 1
                else:
                    self.tally.faults += 1
                    self._require_said(ended, CODES, where)
                self._require_whole(trial, where)
                self._require_same_again(trial, where)

    def change(self, count: int) -> None:
        """Change an input while it is read: the command fails, or its result is that of the old or of the new bytes."""
        for _ in range(count):
            trial = self.ground.trial(self.job)
            inputs = Path(shutil.copytree(self.ground.inputs, self.ground.scratch / f"{trial.name}-inputs"))
            arguments, at = self.job.argv(inputs, trial), self.chance.randrange(12)
            ended = self.ground.children.run(arguments, trial, changes_at(at))
            where = f"{trial.name}: an input changed at read {at}"
            self.tally.changes += 1
            if ended.code:
                self._require_said(ended, (*CODES, 4), where)  # the changed input may no longer match the others
                self._require_whole(trial, where)
                continue
            again = self.ground.trial(self.job)
            self.ground.children.run(self.job.argv(inputs, again), again)
            if self._result(trial) not in (self.expected, self._result(again)):
                self.tally.problems.append(f"{where}: what was made is of neither")

    def meet(self) -> None:
        """Start two processes that write the same output."""
        trial = self.ground.trial(self.job)
        first = self.ground.children.start(self._argv(trial), trial, _stops_once())
        os.waitid(os.P_PID, first, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        second = self.ground.children.run(self._argv(trial), trial)
        os.kill(first, signal.SIGCONT)
        ended = self.ground.children.wait(first)
        self._require_said(second, (8,), f"{trial.name}: a second process")
        if ended.code or self._result(trial) != self.expected:
            self.tally.problems.append(f"{trial.name}: two processes: the first ended with {ended.code}")

    def _argv(self, trial: Path) -> list[str]:
        return list(self.job.argv(self.ground.inputs, trial))

    def _result(self, trial: Path) -> Any:
        from jobs import result

        return result(self.job, trial, self.ground.hub)

    def _require_said(self, ended: Any, codes: tuple[int, ...], where: str) -> None:
        said = ended.said.splitlines()  # the Hub's client may print warnings before the error
        lines = said[next((n for n, line in enumerate(said) if line.startswith("error: ")), 0) :]
        one = len(lines) in (1, 2) and lines[0].startswith("error: ") and lines[-1].startswith(("error: ", "hint: "))
        if ended.code not in codes or not one or "Traceback" in ended.said:
            self.tally.problems.append(f"{where}: exit code {ended.code}: {ended.said[-1500:]}")

    def _require_whole(self, trial: Path, where: str) -> None:
        from jobs import too_early

        wrong = too_early(self.job, trial, self.ground.hub, self.expected, self.old)
        if wrong:
            self.tally.problems.append(f"{where}: {wrong[0]} stands there and is not whole")

    def _require_same_again(self, trial: Path, where: str) -> None:
        again = self.ground.children.run(self._argv(trial), trial)
        found = self._result(trial)
        same = (again.code == 0 or is_done(again)) and found == self.expected
        self.tally.identical += same
        if not same:
            names = [n for n in sorted({*found, *self.expected}) if found.get(n) != self.expected.get(n)]
            self.tally.problems.append(f"{where}: resumed with {again.code}: {names[:5]} differ: {again.said[-1500:]}")


def _stops_once() -> Any:
    stopped = False

    def hook(call: Any) -> None:
        nonlocal stopped
        if call.kind == "write" and call.before and "journal" in call.path and not stopped:
            stopped = True
            os.kill(os.getpid(), signal.SIGSTOP)

    return hook


def disturb(ground: Range, options: argparse.Namespace) -> dict[str, Tally]:
    """Disturb every command."""
    from jobs import JOBS

    tallies = {}
    for job in [job for job in JOBS if options.only in (None, job.name)]:
        began = time.monotonic()
        judge = Judge(ground, job, random.Random(f"{options.seed} {job.name}"))
        if job.name != "publish":  # which writes no local output
            judge.cut(options.cuts)
        judge.fail(options.faults)
        if job.name not in ("pull", "run"):  # which read no local weights, or only their own copies
            judge.change(options.faults)
        if job.name not in ("publish", "run"):
            judge.meet()
        tallies[job.name] = judge.tally
        print(f"{job.name}: {time.monotonic() - began:.1f} s", *judge.tally.problems, sep="\n  ", file=sys.stderr)
    return tallies


def main() -> int:
    """Run the trials that the command line requests."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cuts", type=int, default=20, help="moments at which each command's power is cut")
    parser.add_argument("--faults", type=int, default=10, help="moments at which each fault begins")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="one command")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with proving_ground() as ground:
        tallies = disturb(ground, options)
    if options.json:
        print(json.dumps({name: vars(tally) for name, tally in tallies.items()}))
    else:
        columns = ("cuts", "faults", "harmless", "changes", "identical")
        print(f"{'command':<14} " + " ".join(f"{name:>9}" for name in columns))
        for name, tally in tallies.items():
            print(f"{name:<14} " + " ".join(f"{getattr(tally, column):>9}" for column in columns))
            for problem in tally.problems:
                print(f"  PROBLEM {problem}")
    return int(any(tally.problems for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
