"""Wherever memory runs out, the error is one line that says where, with a hint at what needs less."""

from dataclasses import replace

import pytest
import torch

from adaptkit.errors import NetworkError, UsageError
from adaptkit.training import distributed, observations, preparation, run
from adaptkit.training.config import TrainConfig
from adaptkit.training.distributed import World
from adaptkit.training.dry_run import plan_run
from adaptkit.training.evaluation import evaluate as evaluation
from adaptkit.training.evaluation.comparison import compare
from adaptkit.training.evaluation.evaluate import evaluate
from adaptkit.training.evaluation.options import EvaluateOptions
from adaptkit.training.loop import train
from adaptkit.training.memory import moments, paging
from adaptkit.training.memory.optimizer import PagedAdamW
from adaptkit.training.out_of_memory import reports_out_of_memory


def full(*arguments, **named):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand much more")


@pytest.fixture
def config(llama_nf4, instructions):
    return TrainConfig(
        base=str(llama_nf4), data=(str(instructions),), rank=2, steps=1, batch_size=1, device="cpu",
        compute_dtype="float32", sample_prompts=("Hello",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "name", "where", "hint"),
    [
        (preparation, "load_model", "while the model was loaded", "--shard-base"),
        (run, "make_optimizer", "beside the base", "--optimizer-pages-mib"),
        (observations, "mean_losses", "while held-out samples were evaluated", "--micro-batch-size"),
        (PagedAdamW, "step", "beside the base", "--optimizer adamw8bit"),
        (observations, "generate", "while prompts were answered", "--sample-tokens"),
    ],
)
def test_training_reports_where_memory_ran_out_and_what_needs_less(
    config, tmp_path, monkeypatch, owner, name, where, hint
):
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(UsageError) as caught:
        train(config, tmp_path / "out", note=lambda line: None)
    assert caught.value.message == f"out of memory {where} (CUDA out of memory. Tried to allocate 2.00 GiB.)"
    assert hint in caught.value.hint


@pytest.mark.parametrize("pages_mib", [None, 0.05])
def test_optimizer_state_that_does_not_fit_with_the_base_is_stored_in_host_memory(
    config, tmp_path, monkeypatch, pages_mib
):
    config = replace(config, steps=3, page_kib=4, optimizer_pages_mib=pages_mib, sample_prompts=())
    plain = train(config, tmp_path / "plain")

    class Pages(paging.Pages):
        def __init__(self, count, page_bytes, budget_bytes, *others):
            if budget_bytes != 0:
                torch.empty(1 << 60)
            super().__init__(count, page_bytes, budget_bytes, *others)

    monkeypatch.setattr(moments, "Pages", Pages)
    notes = []
    report = train(config, tmp_path / "short", note=notes.append)
    assert "warning: out of memory beside the base; optimizer state is kept in host memory" in notes
    assert (plain.paging["resident"] > 0, report.paging["resident"]) == (True, 0)
    assert report.tensors_root == plain.tensors_root


@pytest.mark.parametrize("change", [{"page_kib": 1 << 20}, {"optimizer_pages_mib": 0.001}], ids=["all", "budget"])
def test_allocation_is_not_retried_if_a_single_page_does_not_fit(config, tmp_path, monkeypatch, change):
    made = []

    def no_room(*arguments, **named):
        made.append(arguments)
        full()

    monkeypatch.setattr(moments, "Pages", no_room)
    notes = []
    with pytest.raises(UsageError, match="out of memory beside the base"):
        train(replace(config, **change), tmp_path / "out", note=notes.append)
    assert (len(made), notes) == (1, [])


def test_a_dry_run_reports_where_memory_ran_out(config, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "load_model", full)
    with pytest.raises(UsageError, match="out of memory while the model was loaded"):
        plan_run(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "where", "hint"),
    [
        ("load_model", "while the model was loaded", "--device cpu"),
        ("mean_loss", "while the model was evaluated", "--batch-size"),
        ("generate", "while the model was evaluated", "--batch-size"),
    ],
)
def test_evaluation_and_comparison_report_where_memory_ran_out(llama_nf4, instructions, monkeypatch, name, where, hint):
    monkeypatch.setattr(evaluation, name, full)
    options = EvaluateOptions(prompts=("Hello",), device="cpu")
    for measured in (lambda: evaluate(llama_nf4, None, [instructions], options),
                     lambda: compare([llama_nf4], [], [instructions], options)):  # fmt: skip
        with pytest.raises(UsageError, match=f"out of memory {where}") as caught:
            measured()
        assert hint in caught.value.hint


def test_a_real_allocation_failure_is_recognized_and_other_errors_are_not():
    with pytest.raises(UsageError, match="out of memory here"), reports_out_of_memory("here", hint=""):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="size of tensor"), reports_out_of_memory("here", hint=""):
        torch.ones(2) + torch.ones(3)


def test_out_of_memory_is_not_mistaken_for_a_lost_process(monkeypatch):
    world = World(torch.device("cpu"), size=2)
    monkeypatch.setattr(distributed.distributed, "all_reduce", full)
    with pytest.raises(torch.OutOfMemoryError):
        world.total(1.0)

    def gone(*arguments):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(distributed.distributed, "all_reduce", gone)
    with pytest.raises(NetworkError):
        world.total(1.0)
