"""Compute type and device: bfloat16 only where it is fast, named in report and manifest; one GPU per process."""

import json
import platform
import re

import pytest
import torch

from adaptkit.errors import UsageError
from adaptkit.models.memory import Memory
from adaptkit.training import distributed
from adaptkit.training.config import TrainConfig
from adaptkit.training.device import choose_device, choose_dtype, memory_warning, without_cudnn_attention
from adaptkit.training.distributed import join
from adaptkit.training.evaluation import evaluate as evaluation

CPU = torch.device("cpu")


def test_a_requested_compute_type_is_used():
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert choose_dtype("float32", CPU) == torch.float32


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
def test_processors_without_avx512_compute_in_float32():
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if has_avx512 else torch.float32)


@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float32"])
def test_report_and_manifest_name_the_compute_type_instead_of_auto(llama_nf4, instructions, tmp_path, run_cli, asked):
    out = tmp_path / "out"
    arguments = ["--steps", 1, "--batch-size", 1, "--rank", 2, "--device", "cpu", "--compute-dtype", asked, "--json"]
    done = run_cli("train", "--base", llama_nf4, "--data", instructions, "-o", out, *arguments)
    assert done.code == 0, done.stderr
    expected = str(choose_dtype(asked, CPU)).removeprefix("torch.")
    assert json.loads(done.stdout)["compute_dtype"] == expected
    assert json.loads((out / "adaptkit-manifest.json").read_text())["operation"]["options"]["compute_dtype"] == expected
    found = run_cli(
        "evaluate", "--base", llama_nf4, "--data", instructions, "--device", "cpu", "--compute-dtype", asked
    )
    assert f"computed in  {expected}\n" in found.stdout


def test_cudnn_attention_is_disabled_only_within_the_context():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with without_cudnn_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("count", [0, 1, 2])
def test_only_available_devices_are_accepted(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert (choose_device("auto").type, choose_device("cpu")) == ("cuda" if count else "cpu", CPU)
    for name, number in (("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("cuda:2", 2)):
        if number < count:
            assert choose_device(name) == torch.device(name)
        else:
            with pytest.raises(UsageError, match=r"(?m)^device: .* is not available$"):
                choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_a_malformed_device_name_is_not_reported_as_a_missing_device(name):
    with pytest.raises(UsageError, match=f"(?m)^device: must be auto, cpu, cuda or cuda:N, found '{name}'$") as caught:
        choose_device(name)
    assert "cuda" in caught.value.hint


@pytest.fixture
def gpus(monkeypatch):
    """Pretend to have two GPUs; return the list of devices that were made current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.fixture
def torchrun(monkeypatch):
    """Return a function that pretends that torchrun started this process, with a given rank and number of processes."""

    def begin(rank, size):
        started = {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "WORLD_SIZE": size}
        for name, value in started.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(distributed, "rendezvous", lambda address: iter([(None, rank, size)]))
        monkeypatch.setattr(distributed.distributed, "PrefixStore", lambda name, store: store)
        monkeypatch.setattr(distributed.distributed, "init_process_group", lambda *a, **k: None)
        monkeypatch.setattr(distributed.distributed, "destroy_process_group", lambda: None)

    return begin


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_each_process_uses_the_gpu_of_its_local_rank(gpus, torchrun, asked):
    torchrun(1, 2)
    with join(asked) as world:
        assert world.device == gpus[0] == torch.device("cuda", 1)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused_with_the_number_of_gpus(gpus, torchrun, asked):
    torchrun(2, 3)
    with pytest.raises(UsageError, match=r"3 processes .* a GPU each, but it has 2") as caught, join(asked):
        pass
    assert "--nproc-per-node 2" in caught.value.hint


@pytest.mark.parametrize("name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_malformed_torchrun_variable_is_quoted_in_the_error(gpus, torchrun, monkeypatch, name):
    torchrun(0, 2)
    monkeypatch.setenv(name, "first")
    with pytest.raises(UsageError, match=r"which of several processes this is: .*'first'"), join("cuda"):
        pass


def test_one_gpu_is_refused_for_several_processes_of_a_machine(gpus, torchrun, monkeypatch):
    torchrun(0, 2)
    with pytest.raises(UsageError, match="'cuda:1': is one GPU, but 2 processes"), join("cuda:1"):
        pass
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # the other process is on another machine
    with join("cuda:1") as world:
        assert world.device == torch.device("cuda", 1)


def test_processes_on_the_same_gpu_are_not_reported_as_a_network_error(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("ncclInvalidUsage\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA 50")

    monkeypatch.setattr(distributed.distributed, "all_reduce", refuse)
    with pytest.raises(UsageError, match="the same GPU"):
        distributed.World(CPU, size=2).total(1.0)


def test_evaluation_makes_its_gpu_the_current_one(gpus, llama_nf4, monkeypatch):
    """Pinned memory would use memory of the first GPU otherwise."""

    def stop(*arguments):
        raise InterruptedError

    monkeypatch.setattr(evaluation, "load_model", stop)
    with pytest.raises(InterruptedError):
        evaluation.load(llama_nf4, evaluation.EvaluateOptions(device="cuda:1", compute_dtype="float32"))
    assert gpus == [torch.device("cuda", 1)]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_options_that_the_warning_about_memory_names_apply_to_every_method(method):
    named = re.findall(r"--([a-z-]+)", memory_warning(Memory(1, 1, 1, 1, 1, 1), 0, CPU))
    values = {"checkpointing": "sqrt", "optimizer": "adamw8bit"}
    given = {name.replace("-", "_"): values.get(name, 8) for name in named}
    assert len(given) == 5
    TrainConfig(base="base", data=("rows.jsonl",), method=method, **given)
