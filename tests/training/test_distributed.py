"""Two real processes train the same adapter as one, stop on disagreement, and resume after one is killed.

A helper process imports torch once and forks them with the environment that torchrun sets; one test uses torchrun
itself.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny
from folders import tree
from forked import run_helper

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.operations.quantize import quantize
from adaptkit.wording import size

OPTIONS = [
    "--rank", "4", "--steps", "8", "--batch-size", "5", "--micro-batch-size", "2", "--learning-rate", "0.002",
    "--compute-dtype", "float32", "--eval-every", "2", "--save-every", "2", "--device", "cpu", "--held-out", "0.2",
]  # fmt: skip

HELPER = r"""
import json, os, re, signal, socket, sys, time
from pathlib import Path

import forked

forked.prepare("adaptkit.training.loop", "adaptkit.training.run")
base, data, root, *unlike = map(Path, sys.argv[1:6])
options = sys.argv[6:]
noisy = ["--dropout", "0.1", "--neftune-alpha", "5", "--optimizer-pages-mib", "0.01", "--page-kib", "4"]
os.environ["TMPDIR"] = str(root / "temporary")
(root / "temporary").mkdir()


def run(name, *more):
    if name.startswith("crowded"):
        sys.modules["adaptkit.training.run"].free_memory = lambda device: 0
    return forked.adaptkit("train", "--base", base, "--data", data, "-o", root / name, *options, *more)


def shares(name):  # of every divided weight, the bytes here and in all; what stays of the file; predictions
    from dataclasses import replace

    from torch.distributed.tensor import DTensor

    from adaptkit.training.config import TrainConfig
    from adaptkit.training.distributed import World, join
    from adaptkit.training.inputs import read_inputs
    from adaptkit.training.memory.activations import predicted_memory
    from adaptkit.training.preparation import build

    wide = root / "wide"
    options = {"compute_dtype": "float32", "checkpointing": "none", "device": "cpu"}  # no weight's pages are released
    config = TrainConfig(base=str(wide), data=(str(data),), shard_base=True, **options)
    inputs = read_inputs(config, root / name, False)
    with join("cpu") as world:
        model, kept = build(inputs, world, (1, 8))
        divided = {n: p for n, p in model.network.named_parameters() if isinstance(p, DTensor)}
        maps = Path("/proc/self/smaps").read_text()
        mapped = re.findall(rf"{wide}/model.safetensors\n(?:\w+:.*\n)*?Rss: *(\d+) kB", maps)
        plain, all_kept = build(replace(inputs, config=replace(config, shard_base=False)), World(world.device), (1, 8))
        predicted = [predicted_memory(*of) for of in ((model.network, 0, 0, kept), (plain.network, 0, 0, all_kept))]
        print(json.dumps({
            "divided": {n: [p.to_local().nbytes, p.numel() * p.itemsize] for n, p in divided.items()},
            "resident": 1024 * sum(map(int, mapped)),
            "weights": [memory.weights for memory in predicted],
            "activations": [memory.activations for memory in predicted],
        }))
    return 0


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


struck = False  # whether the second process is to die


def die_in_step(number):
    from adaptkit.training.run import Run

    take = Run._step
    Run._step = lambda run, step: os.kill(os.getpid(), signal.SIGKILL) if step == number else take(run, step)


def start_one(name, rank, size, port, *more):
    def work():
        if size > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                           "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        signal.alarm(300)  # rather than to wait for each other
        if struck and rank:
            die_in_step(4)
        return shares(name) if name == "shares" else run(name, *more)

    return forked.fork(root / f"{name}-{rank}.log", work)


def start(name, size, *more, others=()):
    port = free_port()
    return [start_one(name, rank, size, port, *more, *(others if rank else ())) for rank in range(size)]


def ended(children):
    return [forked.ended(child) for child in children]


assert run("none", "--dry-run", "--quiet") == 0  # imports the rest
assert ended(start("one", 1)) == [0]
assert ended(start("two", 2)) == [0, 0]
assert ended(start("sharded", 2, "--shard-base")) == [0, 0]
for other in unlike:
    for name, how in {other.name: [], f"{other.name}-sharded": ["--shard-base"]}.items():
        assert ended(start(name, 2, "--base", str(other), "--steps", "2", *how)) == [0, 0]
assert ended(start("shares", 2)) == [0, 0]
assert ended(start("noisy", 2, *noisy)) == [0, 0]
for name, how in {"crowded": [], "crowded-sharded": ["--shard-base"]}.items():
    assert ended(start(name, 2, "--steps", "1", "--json", *how)) == [0, 0]

for name, how in {"killed": noisy, "parted": ["--shard-base"]}.items():
    struck = True
    children = start(name, 2, *how)
    struck = False
    assert ended(children) == [7, -9]
    assert ended(start(name, 2, *how)) == [0, 0]

for number, code in (signal.SIGINT, 130), (signal.SIGTERM, 143):  # while it waits for another process to join
    port = free_port()
    child = start_one(f"alone-{code}", 0, 2, port, "--json")
    with socket.socket() as other:
        while other.connect_ex(("127.0.0.1", port)):  # it starts waiting soon after it listens
            assert not forked.over(child)
            time.sleep(0.01)
    time.sleep(0.5)
    os.kill(child, number)
    began = time.monotonic()
    assert (forked.ended(child), time.monotonic() - began < 25) == (code, True)

assert ended(start("unlike", 2, others=["--rank", "8", "--data", str(data)])) == [2, 2]
assert ended(start("absent", 2, others=["--data", str(root / "absent.jsonl")])) == [7, 5]
assert ended(start("broken", 2, "--learning-rate", "1e30", "--max-grad-norm", "0")) == [5, 5]
"""


@pytest.fixture(scope="module")
def runs(llama_nf4, gpt2, instructions, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    quantize(tiny.write_llama(root / "wide-16-bit", hidden=512), root / "wide")
    without_body = tiny.write_architecture(tmp_path_factory.mktemp("bases") / "llama4", "llama4_text")
    run_helper(HELPER, root, llama_nf4, instructions, root, gpt2, without_body, *OPTIONS)
    return root


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_report_the_same_losses_and_gradient_norms_as_one(runs):
    """Steps have four or five samples, so the processes' shares of samples and tokens differ."""
    one, two = metrics(runs / "one"), metrics(runs / "two")
    assert [sorted(line) for line in one] == [sorted(line) for line in two]
    for mine, theirs in zip(one, two, strict=True):
        for name, value in mine.items():
            assert theirs[name] == pytest.approx(value, rel=1e-5), (name, mine["step"])


def test_two_processes_train_the_same_adapter_as_one(runs):
    one, two = (read_adapter(runs / name).modules for name in ("one", "two"))
    assert one.keys() == two.keys()
    for module, term in one.items():
        change, other = (t.lora_b @ t.lora_a for t in (term, two[module]))
        assert (change - other).norm() < 1e-3 * change.norm(), module


def test_a_sharded_base_trains_the_same_bits(runs):
    name = "adapter_model.safetensors"
    assert (runs / "sharded" / name).read_bytes() == (runs / "two" / name).read_bytes()
    for mine, theirs in zip(metrics(runs / "sharded"), metrics(runs / "two"), strict=True):
        loss, expected = (line.pop("held_out_loss", 0.0) for line in (mine, theirs))
        assert mine == theirs
        assert loss == pytest.approx(expected, rel=1e-6)
    assert (runs / "sharded-0.log").read_text().startswith("wrote")  # and no warning before it


@pytest.mark.parametrize("base", ["gpt2", "llama4"])
def test_sharded_gpt2_and_llama4_train_the_same_bits(runs, base):
    """GPT-2 stores weights as (in, out); the ``base_model`` of Llama 4's text model is the whole network."""
    name = "adapter_model.safetensors"
    assert (runs / f"{base}-sharded" / name).read_bytes() == (runs / base / name).read_bytes()


def shares(runs, rank):
    return json.loads((runs / f"shares-{rank}.log").read_text())


def test_frozen_weights_are_sharded_evenly(runs):
    first, second = (shares(runs, rank)["divided"] for rank in range(2))
    assert len(first) == 2 * 2 * 7  # codes and constants of seven linear layers in each of two blocks
    for name, (here, whole) in first.items():
        assert here + second[name][0] == whole, name
        assert abs(here - second[name][0]) <= 0.1 * whole, name


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rank", range(2))
def test_the_file_of_a_sharded_base_does_not_stay_in_memory_beside_the_shards(runs, rank):
    codes = sum(whole for name, (_, whole) in shares(runs, rank)["divided"].items() if name.endswith("codes"))
    assert 0 < shares(runs, rank)["resident"] < (runs / "wide/model.safetensors").stat().st_size - 0.8 * codes


@pytest.mark.parametrize("rank", range(2))
def test_a_sharded_base_is_predicted_with_two_whole_layers_and_the_activations_of_any_other(runs, rank):
    """The whole layers are gathered: one is in use, and the memory of the next one is there, too."""
    found, layers = shares(runs, rank), {}
    for name, (_, whole) in found["divided"].items():
        layer = re.search(r"layers\.(\d+)\.", name)[1]
        layers[layer] = layers.get(layer, 0) + whole
    elsewhere = sum(whole - here for here, whole in found["divided"].values())
    sharded, plain = found["weights"]
    assert sharded == plain - elsewhere + 2 * max(layers.values())
    sharded, plain = found["activations"]
    assert sharded == pytest.approx(plain, rel=1e-3)  # a process's first measurement counts a little more
    assert plain > 0


def test_shard_base_is_refused_for_one_process_or_with_checkpointing_sqrt(run_cli, llama_nf4, instructions, tmp_path):
    shown = ["train", "--base", llama_nf4, "--data", instructions, "-o", tmp_path / "a", "--shard-base"]
    done = run_cli(*shown)
    assert done.code == 2
    assert done.stderr.startswith("error: --shard-base: needs several processes, found one\nhint: ")
    done = run_cli(*shown, "--checkpointing", "sqrt")
    assert done.code == 2
    assert "works only with checkpointing auto, layer or none" in done.stderr


def test_incomplete_or_inconsistent_torchrun_variables_are_refused(run_cli, llama_nf4, instructions, tmp_path):
    given = ["train", "--base", llama_nf4, "--data", instructions, "-o", tmp_path / "a"]
    for environment, missing in (({"WORLD_SIZE": "2"}, "RANK"), ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT")):
        done = run_cli(*given, MASTER_ADDR="127.0.0.1", **environment)
        assert done.code == 2
        assert done.stderr.startswith("error: the environment does not say which of several processes this is: ")
        assert f"{missing} expected, but not set" in done.stderr
    for count, rank in (("2", "2"), ("2", "-1"), ("-1", "0"), ("1", "1")):
        done = run_cli(*given, MASTER_ADDR="127.0.0.1", MASTER_PORT="1", WORLD_SIZE=count, RANK=rank)
        assert done.code == 2
        assert f"RANK is {rank}, but WORLD_SIZE is {count}" in done.stderr
    done = run_cli(*given, MASTER_ADDR="127.0.0.1", WORLD_SIZE="two")
    assert (done.code, "'two'" in done.stderr) == (2, True)


def test_a_process_with_rank_1_that_torchrun_did_not_start_prints_its_output(
    run_cli, llama_nf4, instructions, tmp_path
):
    given = ["train", "--base", llama_nf4, "--data", instructions, "-o", tmp_path / "a", "--dry-run", "--json"]
    done = run_cli(*given, RANK="1")
    assert json.loads(done.stdout)["samples"] > 0
    assert json.loads(run_cli(*given, "--rank", "0", RANK="1").stdout)["error"]["code"] == "config"


@pytest.mark.parametrize("code", [130, 143])
def test_a_signal_ends_a_process_that_waits_for_others_to_join(runs, code):
    assert json.loads((runs / f"alone-{code}-0.log").read_text())["error"]["retryable"]


def test_only_the_first_process_writes_and_prints(runs):
    assert (runs / "two-0.log").read_text().startswith("wrote")
    assert (runs / "two-1.log").read_text() == ""
    assert sorted(path.name for path in runs.glob("*.partial")) == ["broken.partial"]


@pytest.mark.parametrize(("name", "is_shared"), [("crowded", True), ("crowded-sharded", False)])
def test_all_processes_of_a_machine_count_in_the_warning_about_memory(runs, name, is_shared):
    """They map the same files of the base, unless it is sharded."""
    warning, document = (runs / f"{name}-0.log").read_text().split("\n", 1)
    memory = json.loads(document)["memory"]
    needed = 2 * memory["predicted"] - is_shared * memory["weights"]
    assert warning.startswith(f"warning: the run needs about {size(needed)} of memory and 0 B are available: ")
    assert ("--checkpointing sqrt" in warning, "--checkpointing layer" in warning) == (is_shared, not is_shared)
    assert (runs / f"{name}-1.log").read_text() == ""


def test_after_a_process_is_killed_the_other_reports_it_and_a_rerun_gives_the_same_bytes(runs):
    first = (runs / "killed-0.log").read_text()
    assert first.startswith("error: another process of this run cannot be reached")
    assert "hint: see its own message for the cause; the same command resumes the run" in first
    assert "Traceback" not in first
    assert "resumed from" in first
    assert tree(runs / "killed") == tree(runs / "noisy")


def test_a_process_that_is_killed_leaves_nothing_in_the_temporary_folder(runs):
    """Where processes other than the first have their pages."""
    assert not list((runs / "temporary").glob("adaptkit*"))


def test_after_a_process_is_killed_a_sharded_run_reports_it_and_resumes_to_the_same_bytes(runs):
    first = (runs / "parted-0.log").read_text()
    assert first.startswith("error: another process of this run cannot be reached")
    assert "Traceback" not in first
    assert "resumed from" in first
    assert tree(runs / "parted").keys() == tree(runs / "sharded").keys()
    name = "adapter_model.safetensors"
    assert (runs / "parted" / name).read_bytes() == (runs / "sharded" / name).read_bytes()


def test_processes_with_different_options_or_data_are_refused(runs):
    for rank, of in enumerate(("", "process 1: ")):
        message, hint = (runs / f"unlike-{rank}.log").read_text().splitlines()
        assert message == f"{of}error: process 1 differs from the first: rank is 4 there and 8 here; another data"
        assert hint == f"{of}hint: start all processes with the same options, base and data"
    assert not (runs / "unlike.partial").exists()


def test_no_process_waits_for_one_that_cannot_read_its_data(runs):
    assert (runs / "absent-0.log").read_text().startswith("error: another process of this run cannot be reached")
    assert "absent.jsonl: cannot be read" in (runs / "absent-1.log").read_text()


def test_processes_stop_at_the_same_step_and_name_the_samples_of_all_processes(runs):
    messages = [(runs / f"broken-{rank}.log").read_text().splitlines() for rank in range(2)]
    assert messages[0][0].startswith("error: the loss is nan at step")
    assert messages[1] == [f"process 1: {line}" for line in messages[0]]
    named = re.findall(r"line \d+", messages[0][0])
    assert len(named) == len(set(named)) in (4, 5)  # all of a step, not one process's half


def test_torchrun_restarts_a_run_after_a_process_is_killed(runs, llama_nf4, instructions, tmp_path):
    output = tmp_path / "adapter"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
        "--monitor-interval", "0.1", "-m", "adaptkit", "train", "--base", str(llama_nf4), "--data", str(instructions),
        "-o", str(output), *OPTIONS, "--dropout", "0.1", "--neftune-alpha", "5",
        "--optimizer-pages-mib", "0.01", "--page-kib", "4",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    live, deadline = output.with_name("adapter.partial") / "metrics.jsonl", time.monotonic() + 120
    while not live.exists() or len(live.read_bytes().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()  # noqa: PT018
        time.sleep(0.001)
    os.kill(worker_of(process.pid, "1"), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert "resumed from" in stdout
    assert tree(output) == tree(runs / "noisy")


def worker_of(parent, rank):
    """Return the ID of the child process that has a given rank."""
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        for child in file.read().split():
            with open(f"/proc/{child}/environ", "rb") as environment:
                if f"RANK={rank}".encode() in environment.read().split(b"\0"):
                    return int(child)
    raise AssertionError("no such worker")
