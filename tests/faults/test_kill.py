"""A run that is killed at any moment shows nothing, and the same command ends in the same bytes.

Each operation runs in a child of one helper process, which imports torch once, and is killed from outside with
SIGKILL: at moments spread over the time that an undisturbed run takes, and in the middle of its writing.
"""

import json
import subprocess
import sys

import pytest
import tiny

from adaptkit.checkpoint.journal import JOURNAL_NAME

HELPER = """
import json, os, random, signal, sys, time, warnings
from pathlib import Path

import torch
from adaptkit.numerics.kernels import cpu
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.unmerge import unmerge

warnings.simplefilter("ignore")  # newer Pythons warn of forks
base, adapter, merged, root = map(Path, sys.argv[2:6])
operations = {
    "quantize": lambda out, told: quantize(base, out, QuantizeOptions(max_shard_bytes=300_000), progress=told),
    "merge": lambda out, told: merge(base, [adapter], out, progress=told),
    "unmerge": lambda out, told: unmerge(merged, [adapter], out, progress=told),
}
operate = operations[sys.argv[1]]


def start(out, dies_at=2.0):
    def told(done, total):
        if done >= dies_at * total:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        operate(out, told)
        os._exit(0)
    return child


def killed(child):
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def seen(out):
    partial = out.with_name(out.name + ".partial")
    journal = partial / "adaptkit-journal.jsonl"
    return {"visible": out.exists(), "lines": len(journal.read_bytes().splitlines()) if journal.exists() else 0}


began = time.monotonic()
assert not killed(start(root / "undisturbed"))
duration = time.monotonic() - began
report = []
chance = random.Random(7)
for number, dies_at in enumerate((0.1, 0.4, 0.7, 0.95)):
    out = root / f"progress-{number}"
    assert killed(start(out, dies_at))
    report.append(seen(out) | {"name": out.name})
    assert killed(start(out, dies_at + 0.04))
    assert not killed(start(out))
for number in range(6):
    out = root / f"moment-{number}"
    for attempt in range(2):
        child = start(out)
        time.sleep(duration * chance.random())
        os.kill(child, signal.SIGKILL)
        if not killed(child):
            break
        report.append(seen(out) | {"name": out.name})
        if out.exists():
            break  # the kill came after the rename
    if not out.exists():
        assert not killed(start(out))
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    from adaptkit.operations.merge import merge

    root = tmp_path_factory.mktemp("kill")
    base = tiny.write_llama(root / "base", layers=12, hidden=128, shards=4)
    adapter = tiny.write_peft_adapter(root / "adapter", base, target_modules=["q_proj", "up_proj"])
    merge(base, [adapter], root / "merged")
    return [base, adapter, root / "merged"]


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("operation", ["quantize", "merge", "unmerge"])
def test_a_killed_run_shows_nothing_and_ends_in_the_same_bytes(inputs, tmp_path, operation):
    arguments = [sys.executable, "-c", HELPER, operation, *inputs, tmp_path]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = tree(tmp_path / "undisturbed")
    assert JOURNAL_NAME not in expected
    reports = json.loads(done.stdout)
    inside = [report for report in reports if report["name"].startswith("progress")]
    assert len(inside) == 4
    assert not any(report["visible"] for report in inside)
    assert len({report["lines"] for report in inside}) > 1, "the kills fell at different stages"
    assert len(reports) >= 7, "most of the random kills came in time"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"undisturbed", *(f"progress-{n}" for n in range(4)), *(f"moment-{n}" for n in range(6))}
    for name in sorted(names):
        assert tree(tmp_path / name) == expected, name


def test_finished_shards_are_not_written_again(inputs, tmp_path):
    """Going on costs only what is missing: the file that the first run finished keeps its time stamp."""
    from adaptkit.operations.quantize import QuantizeOptions, quantize

    class Stop(Exception):  # noqa: N818 - not an error
        pass

    def stop(done, total):
        if done > total * 0.6:
            raise Stop

    options = QuantizeOptions(max_shard_bytes=300_000)
    with pytest.raises(Stop):
        quantize(inputs[0], tmp_path / "out", options, progress=stop)
    journal = (tmp_path / "out.partial" / JOURNAL_NAME).read_text().splitlines()
    finished = [json.loads(line)["file"]["path"] for line in journal[1:]]
    assert len(finished) > 1
    before = {name: (tmp_path / "out.partial" / name).stat().st_mtime_ns for name in finished}
    quantize(inputs[0], tmp_path / "out", options)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == before
