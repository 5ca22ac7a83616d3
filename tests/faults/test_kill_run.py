"""A killed ``run`` can be resumed, and ends with the same bytes and the same lock.

The command line runs in children of a helper process, which imports torch once. It is killed from outside four times:
as the first step begins, twice during training, and as the evaluation begins.
"""

import json
import signal
import subprocess
import sys

import pytest
import tiny

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

MOMENTS = ["*/small.json", "*/adapter.partial/checkpoint-2", "*/adapter.partial/checkpoint-5", "*/judged.json"]

HELPER = '''
import gc

gc.disable()  # collections take a fifth of the time of the imports
import json, os, signal, sys, time, warnings
from pathlib import Path

import matplotlib.backends.backend_svg
import adaptkit.pipeline.run
from adaptkit.cli.main import main

gc.freeze()
gc.enable()
warnings.simplefilter("ignore")  # newer Pythons warn of forks
root, moments = Path(sys.argv[1]), json.loads(sys.argv[2])  # a file or folder whose making is the moment


def run(name, *more):
    sys.argv = ["adaptkit", "run", str(root / "recipe.yaml"), "--work", str(root / name), *more]
    try:
        main()
    except SystemExit as end:
        return end.code


def start(name):
    child = os.fork()
    if child == 0:
        log = os.open(root / (name + ".log"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        code = run(name)
        sys.stdout.flush()
        os._exit(code)
    return child


def ended(child):
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def finished(name):
    """The modification times of all files of complete outputs, by path."""
    complete = [path.parent for path in (root / name).glob("*/*/adaptkit-manifest.json") if ".partial" not in str(path)]
    files = [file for folder in complete for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(root / name).as_posix(): file.stat().st_mtime_ns for file in files}


def over(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


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
    arguments = [sys.executable, "-c", HELPER, str(root), json.dumps(MOMENTS)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    logs = "".join(path.read_text() for path in sorted(root.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs
    return root, json.loads(done.stdout.splitlines()[-1])


def artifacts(work):
    """All files of all artifacts; not the records of steps, which lack figures if a kill came just after the step."""
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
