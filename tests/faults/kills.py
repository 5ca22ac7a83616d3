"""Kill every command at chosen and random moments, run it again, and compare every byte with an undisturbed run.

    kills.py --count 300 [--seed 1] [--only merge] [--json]

Chosen moments are before, within and after calls that change the disk (such as a write, an fsync, a rename or an
unlink) or reach the network; random ones are spread over the duration of an undisturbed run. Prints a table, and exits
with 1 if anything was lost, incomplete or different.
"""

import argparse
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # the threads of a pool do not exist in a forked child
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "fixtures")]

SIGNALS = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
"""The exit code for each signal."""
MEMORY = "/dev/shm"
"""A file system on which fsync is free."""
HINT = "run the same command again to resume"


@dataclass
class Tally:
    """Results for one command."""

    kills: int = 0
    signals: Counter[str] = field(default_factory=Counter)
    chosen: int = 0
    trials: int = 0
    identical: int = 0
    problems: list[str] = field(default_factory=list)


class Range:
    """The place of the trials: a scratch folder with tiny inputs, and a Hub."""

    def __init__(self, scratch: Path, hub: Path) -> None:
        from children import Children

        self.scratch, self.hub, self.inputs = scratch, hub, scratch / "inputs"
        self.children = Children(scratch, scratch.parent / "log.txt")
        self._trials = 0

    def prepare(self) -> None:
        """Make the inputs; this also loads and compiles what the children need."""
        import jobs

        from adaptkit.cli.main import cli

        (self.inputs / jobs.TEMPORARY).mkdir(parents=True)
        self._require(self.children.call(lambda: jobs.write_sources(self.inputs), self.inputs))
        for line in jobs.INPUTS:
            cli.main([*line.replace("{in}", str(self.inputs)).split(), "--quiet"], standalone_mode=False)
        self._require(self.children.run(["publish", f"{self.inputs}/stacked", "me/source", "--quiet"], self.inputs))
        if len(os.listdir("/proc/self/task")) > 1:
            raise SystemExit("kills: a process that forks must have one thread")

    def trial(self, job: Any) -> Path:
        """Make the folder of a new trial."""
        self._trials += 1
        folder = self.scratch / f"trial-{self._trials}"
        job.prepare(self.inputs, folder)
        return folder

    def undisturbed(self, job: Any) -> tuple[Any, list[Any], float]:
        """Run a job; return its result, the calls that reached the disk or the network, and its duration in seconds."""
        from children import recorded, records
        from jobs import result

        log = self.scratch.parent / f"calls-{job.name}.jsonl"
        trial = self.trial(job)
        self._require(self.children.run(job.argv(self.inputs, trial), trial))
        watched = self.trial(job)
        began = time.monotonic()
        self._require(self.children.run(job.argv(self.inputs, watched), watched, records(log)))
        seconds = time.monotonic() - began
        made = result(job, trial, self.hub)
        if not made or made != result(job, watched, self.hub):
            raise SystemExit(f"{job.name}: two undisturbed runs differ")
        return made, recorded(log), seconds

    def old(self, job: Any) -> Any:
        """Return the files under the final name before a job begins."""
        from jobs import below, tree

        merged = below(tree(self.inputs), "merged") if job.replaces else {}
        return {name.replace("merged/", "out/", 1): content for name, content in merged.items()}

    def _require(self, ended: Any) -> None:
        if ended.code:
            raise SystemExit(f"kills: preparing failed with {ended.code}: {ended.said}")


def attack(ground: Range, job: Any, count: int, chance: random.Random) -> Tally:
    """Kill a job ``count`` times."""
    from jobs import too_early

    expected, calls, seconds = ground.undisturbed(job)
    tally, points = Tally(), _points(calls, chance)
    while tally.kills < count:
        trial = ground.trial(job)
        for _ in range(1 + chance.randrange(2)):  # a resumed run may be killed too
            number = min(SIGNALS, key=lambda number: (tally.signals[number.name], chance.random()))  # in equal shares
            ended = _strike(ground, job, trial, points, seconds, number, chance, tally, expected)
            if ended.code not in SIGNALS.values() or tally.problems:
                break
            wrong = too_early(job, trial, ground.hub, expected, ground.old(job))
            if wrong:
                tally.problems.append(f"{trial.name}: {wrong[0]} stands there and is not whole")
        _resume(ground, job, trial, expected, tally)
        if len(tally.problems) > 3:
            break
    return tally


def _points(calls: list[Any], chance: random.Random) -> list[Any]:
    """Return all moments before, within and after calls, ordered so that each kind of call comes early."""
    from children import Point, counter_of

    found: dict[tuple[str, str], list[Any]] = {}
    for call in calls:
        if call.kind == "read":
            continue
        for when in ("before", "in" if call.kind == "write" else "after"):
            found.setdefault((call.kind, when), []).append(Point(call.number, when, counter_of(call.kind)))
    for kind in found.values():
        chance.shuffle(kind)
    order = []
    while found:
        for key in chance.sample(sorted(found), len(found)):
            order.append(found[key].pop())
            if not found[key]:
                del found[key]
    return order


def _strike(ground: Range, job: Any, trial: Path, points: list[Any], seconds: float, number: int, chance: random.Random,
            tally: Tally, expected: Any) -> Any:  # fmt: skip
    """Kill a job once, in two of three cases at a chosen point, and check how it ended."""
    from children import NOT_BEGUN, dies_at
    from jobs import result

    arguments = job.argv(ground.inputs, trial)
    at_point = chance.random() < 2 / 3
    if at_point:
        point = points.pop(0)
        points.append(point)
        ended, where = ground.children.run(arguments, trial, dies_at(point, number)), str(point)
    else:
        delay = seconds * chance.random()
        ended = ground.children.strike(ground.children.start(arguments, trial), delay, number)
        where = f"after {delay:.3f} s"
    late = number != signal.SIGKILL and ended.code == -number and result(job, trial, ground.hub) == expected
    if late or ended.code in (0, NOT_BEGUN) or is_done(ended):
        return ended
    tally.kills += 1
    tally.chosen += at_point
    tally.signals[signal.Signals(number).name] += 1
    if ended.code != SIGNALS[signal.Signals(number)]:
        tally.problems.append(
            f"{trial.name}: {signal.Signals(number).name} {where}: exit code {ended.code}: {ended.said}"
        )
    # What a destructor that the signal interrupts cannot raise, Python prints after everything else.
    elif number != signal.SIGKILL and not _is_one_error(ended.said.partition("Exception ignored in")[0]):
        tally.problems.append(f"{trial.name}: {signal.Signals(number).name} {where}: it says {ended.said!r}")
    return ended


def _is_one_error(said: str) -> bool:
    return HINT in said and "Traceback" not in said


def is_done(ended: Any) -> bool:
    """Whether a command says that its output exists, since the run before was killed after the last rename."""
    return ended.code == 8 and "already exists" in ended.said


def _resume(ground: Range, job: Any, trial: Path, expected: Any, tally: Tally) -> None:
    """Run the command again and compare; if the earlier run had completed, it must say so and change nothing."""
    from jobs import result

    again = ground.children.run(job.argv(ground.inputs, trial), trial)
    tally.trials += 1
    found = result(job, trial, ground.hub)
    goes_on = again.code == 0 or is_done(again)
    tally.identical += goes_on and found == expected
    if not goes_on or found != expected:
        names = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
        tally.problems.append(f"{trial.name}: resumed with {again.code}: {names[:5]} differ: {again.said}")


@contextmanager
def proving_ground() -> Iterator[Range]:
    """Import everything, start a Hub and make the inputs."""
    warnings.simplefilter("ignore")  # newer Pythons warn of forks
    with TemporaryDirectory(prefix="kills-", dir=MEMORY if os.path.isdir(MEMORY) else None) as folder:
        root = Path(folder)
        command = [sys.executable, str(ROOT / "scripts/local_hub.py"), str(root / "hub")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as hub:
            try:
                _import(hub.stdout.readline().strip() if hub.stdout else "", root)
                ground = Range(root / "scratch", root / "hub")
                ground.prepare()
                yield ground
            finally:
                gc.unfreeze()  # libraries check for leftover objects at exit
                hub.terminate()


def main() -> int:
    """Run the trials that the command line requests."""
    options = _options()
    with proving_ground() as ground:
        tallies = _attack_all(ground, options)
    _show(tallies, options.json)
    return int(any(tally.problems for tally in tallies.values()))


def _attack_all(ground: Range, options: argparse.Namespace) -> dict[str, Tally]:
    from jobs import JOBS

    chosen = [job for job in JOBS if options.only in (None, job.name)]
    shares = [options.count // len(chosen) + (n < options.count % len(chosen)) for n in range(len(chosen))]
    tallies = {}
    for job, count in zip(chosen, shares, strict=True):
        began = time.monotonic()
        tallies[job.name] = attack(ground, job, count, random.Random(f"{options.seed} {job.name}"))
        print(f"{job.name}: {tallies[job.name].kills} kills, {time.monotonic() - began:.1f} s", file=sys.stderr)
    return tallies


def _import(url: str, root: Path) -> None:
    """Import all that commands need, so that children have it; huggingface_hub reads its environment when imported."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
        del os.environ[name]
    os.environ |= {"HF_ENDPOINT": url, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_any"}
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from preloading import imports_for_forks

    with imports_for_forks():
        for name in ("matplotlib.backends.backend_svg", "peft", "transformers", "adaptkit.pipeline.run",
                     "adaptkit.training.loop"):  # fmt: skip
            import_module(name)
        from hidden import build_conversions

        from adaptkit.cli import commands
        from adaptkit.discovery import load, names

        for name in names(commands):
            load(commands, name, "command")
        build_conversions()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="kills, over all commands")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="one command")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _show(tallies: dict[str, Tally], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: vars(tally) for name, tally in tallies.items()}))
        return
    print(
        f"{'command':<14} {'kills':>5} {'KILL':>5} {'INT':>5} {'TERM':>5} {'chosen':>6} {'trials':>6} {'identical':>9}"
    )
    for name, tally in tallies.items():
        numbers = [tally.signals[f"SIG{signal}"] for signal in ("KILL", "INT", "TERM")]
        row = [tally.kills, *numbers, tally.chosen, tally.trials, tally.identical]
        print(f"{name:<14} " + " ".join(f"{n:>{w}}" for n, w in zip(row, (5, 5, 5, 5, 6, 6, 9), strict=True)))
        for problem in tally.problems:
            print(f"  PROBLEM {problem}")


if __name__ == "__main__":
    sys.exit(main())
