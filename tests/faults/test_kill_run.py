"""A killed ``run`` can be resumed, and ends with the same bytes and the same lock.

The command line runs in children of a helper process, which imports torch once. It is killed from outside four times:
as the first step begins, twice during training, and as the evaluation begins.
"""

import json
import signal

import pytest
import tiny
from forked import run_helper

RECIPE = """\
name: tiny
sources:
  base: {path: model}
  rows: {path: rows.jsonl}
steps:
  small: {quantize: base}
  adapter: {train: small, data: [rows], rank: 2, steps: 8, batch_size: 2, save_every: 1, device: cpu, seed: 3}
  judged: {evaluate: small, adapter: adapter, data: [rows], device: cpu, require: {loss: {max: 9}}}
  merged: {merge: base, adapters: [adapter]}
  loads: {check: merged, target: [vllm]}
"""

MOMENTS = ["*/small.partial", "*/adapter.partial/checkpoint-2", "*/adapter.partial/checkpoint-5", "*/judged.json"]

HELPER = '''
import json, os, signal, sys, time
from pathlib import Path

from forked import adaptkit, ended, fork, over, prepare

prepare("adaptkit.pipeline.run")
root, moments = Path(sys.argv[1]), json.loads(sys.argv[2])  # a file or folder whose making is the moment


def run(name, *more):
    return adaptkit("run", root / "recipe.yaml", "--work", root / name, *more)


def start(name):
    return fork(root / (name + ".log"), lambda: run(name))


def finished(name):
    """The modification times of all files of complete outputs, by path."""
    complete = [path.parent for path in (root / name).glob("*/*/adaptkit-manifest.json") if ".partial" not in str(path)]
    files = [file for folder in complete for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(root / name).as_posix(): file.stat().st_mtime_ns for file in files}


assert run("none", "--dry-run", "--quiet") == 0  # imports the rest
assert ended(start("undisturbed")) == 0
lock = (root / "recipe.lock").read_bytes()
(root / "recipe.lock").unlink()
ends, outputs, times = [], [], {}
for moment in moments:
    child = start("killed")
    while not any((root / "killed").glob(moment)) and not over(child):
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    ends.append(ended(child))
    found = finished("killed")
    outputs.append(sorted({path.split("/")[1] for path in found}))
    times = found | times
unfinished = not (root / "recipe.lock").exists()
assert ended(start("killed")) == 0
same = (root / "recipe.lock").read_bytes() == lock
rewritten = sorted(times.items() - finished("killed").items())
print(json.dumps(
    {"ends": ends, "unfinished": unfinished, "same_lock": same, "outputs": outputs, "rewritten": rewritten}
))
'''


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill-run")
    tiny.write_llama(root / "model")
    tiny.write_instructions(root / "rows.jsonl")
    (root / "recipe.yaml").write_text(RECIPE)
    return root, json.loads(run_helper(HELPER, root, root, json.dumps(MOMENTS)).splitlines()[-1])


def artifacts(work):
    """All files of all artifacts."""
    return {
        path.relative_to(work).as_posix(): path.read_bytes()
        for path in work.rglob("*")
        if path.is_file() and len(path.relative_to(work).parts) > 2
    }


def test_a_run_killed_several_times_ends_in_the_same_bytes(killed):
    root, report = killed
    assert report["ends"] == [-signal.SIGKILL] * len(MOMENTS)
    assert report["unfinished"]
    assert report["same_lock"]
    expected = artifacts(root / "undisturbed")
    assert any(name.endswith("merged/model.safetensors") for name in expected)
    assert artifacts(root / "killed") == expected
    assert [path for path in (root / "killed").rglob("*.partial")] == []


def test_finished_steps_are_not_repeated_after_a_kill(killed):
    """The files of outputs that were complete at a kill keep their modification times."""
    root, report = killed
    expected = [set(), {"small"}, {"small"}, {"small", "adapter"}]
    assert [sorted(names - set(found)) for names, found in zip(expected, report["outputs"], strict=True)] == [[]] * 4
    assert report["rewritten"] == []
    log = (root / "killed.log").read_text()
    assert "small: quantize: kept" in log
    assert "adapter: train: done" in log
