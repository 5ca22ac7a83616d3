"""A training run that is killed or interrupted, or whose checkpoints are damaged, ends in the same bytes.

The command line runs in children of a helper process, which imports torch once. It is killed from outside: at random
moments of the duration of an undisturbed run, and while it writes a checkpoint.
"""

import json
import re
import shutil

import pytest
import tiny
from folders import tree
from forked import run_helper
from interrupted import stop_after

from adaptkit.operations.quantize import quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train
from adaptkit.training.resume import checkpoints, newest_checkpoint

OPTIONS = [
    "--rank", "4", "--steps", "10", "--batch-size", "2", "--micro-batch-size", "1", "--learning-rate", "40",
    "--compute-dtype", "float32", "--dropout", "0.1", "--neftune-alpha", "5", "--eval-every", "2", "--patience", "3",
    "--sample-prompts", "hello", "--sample-every", "5", "--sample-tokens", "3", "--page-kib", "4",
    "--optimizer-pages-mib", "0.01", "--on-non-finite", "skip", "--device", "cpu", "--pack", "--max-length", "256",
    "--optimizer", "adamw8bit",
]  # fmt: skip

HELPER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path

from forked import adaptkit, ended, fork, over, prepare

prepare("adaptkit.training.loop")
base, data, root = map(Path, sys.argv[1:4])
options, chance = sys.argv[4:], random.Random(3)


def run(name, *more):
    return adaptkit("train", "--base", base, "--data", data, "-o", root / name, *options, *more)


def start(name, save_every):
    return fork(root / (name + ".log"), lambda: run(name, "--save-every", save_every))


def wait_for(condition):
    while not condition():
        time.sleep(0.0002)


def half(work, after):  # a checkpoint being written, of a later step
    try:
        names = [name for name in os.listdir(work) if name.startswith("checkpoint-") and name.endswith(".partial")]
    except FileNotFoundError:
        return 0
    return max([step for step in (int(name[11:-8]) for name in names) if step > after], default=0)


def steps(work):  # the last step that is logged in a whole line
    log = (work / "metrics.jsonl").read_text() if (work / "metrics.jsonl").exists() else ""
    return max([json.loads(line).get("step", 0) for line in log.rpartition("\\n")[0].splitlines()], default=0)


assert run("none", "--dry-run", "--quiet") == 0  # imports the rest
began = time.monotonic()
assert ended(start("undisturbed", 1)) == 0
duration = time.monotonic() - began
report = {"moments": 0, "halves": 0, "signals": []}

while not report["moments"]:  # at any moment
    for attempt in range(3):
        child = start("moment", 1)
        time.sleep(duration * (0.2 + 0.6 * chance.random()))
        os.kill(child, signal.SIGKILL)
        ended(child)
        if (root / "moment").exists():
            break
        report["moments"] += 1
    else:
        assert ended(start("moment", 1)) == 0
    if not report["moments"]:  # faster than the undisturbed one: again, and killed sooner
        shutil.rmtree(root / "moment")
        duration /= 2

work, killed_at = root / "half.partial", 0
while report["halves"] < 2 and not (root / "half").exists():  # what is half a checkpoint is found by the next run
    child = start("half", 1)
    wait_for(lambda: over(child) or half(work, killed_at))
    os.kill(child, signal.SIGKILL)
    ended(child)
    report["halves"] += half(work, killed_at) > 0
    killed_at = half(work, killed_at) or killed_at
assert (root / "half").exists() or ended(start("half", 1)) == 0

work = root / "signal.partial"


def interrupt():
    report["signals"] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        child, seen = start("signal", 0), steps(work)
        wait_for(lambda: over(child) or steps(work) >= seen + 2)  # one of them is finished, whatever else is logged
        os.kill(child, number)
        code = ended(child)
        saved = sorted(int(p.name.removeprefix("checkpoint-")) for p in work.glob("checkpoint-*"))
        report["signals"].append({"code": code, "saved": saved})
        if code == 0:  # the run ended before the signal
            return shutil.rmtree(root / "signal")
    return True


any(interrupt() for attempt in range(5))
assert ended(start("signal", 0)) == 0
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill-training")
    quantize(tiny.write_llama(root / "base"), root / "nf4")
    return root / "nf4", tiny.write_instructions(root / "rows.jsonl")


@pytest.fixture(scope="module")
def killed(inputs, tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    return root, json.loads(run_helper(HELPER, root, *inputs, root, *OPTIONS))


def test_runs_killed_at_any_moment_end_in_the_same_bytes(killed):
    root, report = killed
    expected = tree(root / "undisturbed")
    assert "last/adapter_model.safetensors" in expected, "the best adapter is not the last one"
    assert report["moments"] >= 1
    assert report["halves"] >= 1
    for name in ("moment", "half", "signal"):
        found = tree(root / name)
        if name == "signal":  # its manifests record a different save_every
            assert found.keys() == expected.keys()
            found = {path: content for path, content in found.items() if "manifest" not in path}
        assert found.items() <= expected.items(), name
        assert len(found) >= len(expected) - 2
        assert not (root / f"{name}.partial").exists()
    assert "resumed from" in (root / "half.log").read_text()


def test_an_interrupted_run_saves_a_checkpoint_and_says_how_to_resume(killed):
    root, report = killed
    assert [signal["code"] for signal in report["signals"]] == [130, 143]
    first, second = (signal["saved"] for signal in report["signals"])
    assert first, "without a checkpoint every so many steps, an interruption makes one"
    assert second[-1] > first[-1]
    log = (root / "signal.log").read_text()
    for word in ("interrupted", "terminated"):
        assert f"error: {word}\nhint: run the same command again to resume\n" in log
    assert "Traceback" not in log


# Damage


@pytest.fixture
def config(inputs):
    base, data = map(str, inputs)
    return TrainConfig(base=base, data=(data,), rank=2, steps=6, batch_size=4, compute_dtype="float32", save_every=2,
                       keep_checkpoints=3, device="cpu")  # fmt: skip


@pytest.fixture
def interrupted(config, tmp_path):
    """Folder of an interrupted run, with checkpoints after steps 2, 4 and 5."""
    stop_after(config, tmp_path / "adapter", 5)
    assert [step for step, _ in checkpoints(tmp_path / "adapter.partial")] == [2, 4, 5]
    return tmp_path / "adapter.partial"


def test_any_damage_to_a_checkpoint_is_detected(interrupted):
    """Each file is truncated, emptied, extended, removed, or has one of many bits flipped."""
    for path in sorted((interrupted / "checkpoint-5").iterdir()):
        content = path.read_bytes()
        bits = 8 * len(content)
        variants = [content[: len(content) // 2], b"", content[:-1], content + b"\0"]
        for bit in range(0, bits, max(1, bits // 97)):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            variants.append(bytes(changed))
        for number, variant in enumerate(variants):
            path.write_bytes(variant)
            notes = []
            found = newest_checkpoint(interrupted, notes.append)
            assert found.step == 4, (path.name, number)
            assert notes[0].startswith("warning: checkpoint-5 is damaged")
        path.unlink()
        assert newest_checkpoint(interrupted, notes.append).step == 4
        path.write_bytes(content)
        assert newest_checkpoint(interrupted, notes.append).step == 5


def test_damaged_checkpoints_are_skipped_and_only_their_steps_repeated(config, interrupted, tmp_path):
    undisturbed = train(config, tmp_path / "undisturbed")
    for step, victim in ((5, "state.safetensors"), (4, "checkpoint.json")):
        path = interrupted / f"checkpoint-{step}" / victim
        path.write_bytes(path.read_bytes()[:100])
    copies = [shutil.copytree(interrupted, tmp_path / f"{name}.partial") for name in ("one", "none")]
    shutil.rmtree(copies[1] / "checkpoint-2")
    for name, step, count in (("one", 2, 2), ("none", 0, 2)):
        notes = []
        report = train(config, tmp_path / name, note=notes.append)
        assert (report.resumed_from, len(notes)) == (step, count)
        assert tree(tmp_path / name) == tree(tmp_path / "undisturbed")
        assert report.manifest_sha256 == undisturbed.manifest_sha256


def test_files_and_folders_that_are_not_checkpoints_do_not_prevent_resuming(config, interrupted, tmp_path):
    (interrupted / "checkpoint-latest").mkdir()
    (interrupted / "checkpoint-9.partial").mkdir()
    (interrupted / "checkpoint-7").write_text("a file")
    notes = []
    assert train(config, tmp_path / "adapter", note=notes.append).resumed_from == 5
    assert notes[0].startswith("warning: checkpoint-7 is damaged")


def test_a_checkpoint_without_disk_space_ends_in_an_error_and_loses_nothing(config, interrupted, run_cli, tmp_path):
    """A limit on file sizes simulates a full disk: a write fails midway."""
    expected = tree(interrupted / "checkpoint-5")
    size = (interrupted / "checkpoint-5" / "state.safetensors").stat().st_size
    arguments = [
        "train", "--base", config.base, "--data", config.data[0], "-o", str(tmp_path / "adapter"), "--rank", "2",
        "--steps", "6", "--batch-size", "4", "--compute-dtype", "float32", "--save-every", "2",
        "--keep-checkpoints", "3", "--device", "cpu", "--page-kib", "4",
    ]  # fmt: skip
    done = run_cli(*arguments, limits={"FSIZE": size - 1000})
    assert done.code == 1
    pattern = rf"error: {interrupted}/[\w.-]+/state\.safetensors: cannot write: File too large\nhint: "
    assert re.match(pattern, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert tree(interrupted / "checkpoint-5") == expected
    assert [path.name for path in interrupted.glob("*.partial")] == []
    assert train(config, tmp_path / "adapter").resumed_from == 5
