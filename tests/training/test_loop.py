"""A training run lowers the loss, gives the same result with any paging or checkpointing, and resumes after a kill."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import flip
from interrupted import stop_after
from peft_formulas import running
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import MANIFEST_NAME, require_manifest
from adaptkit.checkpoint.writer import DiskError
from adaptkit.cli.commands import train as train_command
from adaptkit.data.batches import Batches
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import ConflictError, IntegrityError, NonFiniteError, OutputExistsError, UsageError
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.verify import verify
from adaptkit.training.config import TrainConfig
from adaptkit.training.dry_run import plan_run
from adaptkit.training.evaluation.evaluate import EvaluateOptions, evaluate
from adaptkit.training.loop import train
from adaptkit.training.network import loss as network_loss
from adaptkit.training.network.loss import summed_loss


@pytest.fixture(scope="module")
def config(llama_nf4, instructions):
    return TrainConfig(
        base=str(llama_nf4), data=(str(instructions),), rank=4, steps=12, batch_size=4, learning_rate=5e-3,
        compute_dtype="float32", dropout=0.1, save_every=0, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "adapter"
    return output, train(config, output)


def test_the_held_out_loss_falls_and_the_adapter_verifies(trained):
    output, report = trained
    assert report.held_out_after < 0.9 * report.held_out_before
    assert verify(output).kind == "adapter"
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "adaptkit-manifest.json", "loss.svg", "metrics.jsonl",
    ]  # fmt: skip
    assert not output.with_name("adapter.partial").exists()


def test_the_metrics_hold_every_step(trained):
    lines = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert all(math.isfinite(line["loss"]) and line["answer_tokens"] > 0 for line in lines if "loss" in line)


def test_peft_loads_the_adapter_and_measures_the_same_loss(trained, llama, instructions):
    """Both use the 16-bit base, although the adapter was trained on the quantized one."""
    from adaptkit.data.dataset import load_data

    model, tokenizer = running(llama, trained[0]), load_tokenizer(llama)
    total = tokens = 0
    for sample in load_data([instructions], tokenizer, 1024).samples:
        ids, labels = torch.tensor([sample.ids]), torch.tensor([sample.labels])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * sample.answer_tokens
        tokens += sample.answer_tokens
    found = evaluate(llama, trained[0], [instructions], EvaluateOptions(compute_dtype="float32", device="cpu"))
    assert found.answer_tokens == tokens
    assert found.loss == pytest.approx(total / tokens, rel=1e-4)
    without = evaluate(llama, None, [instructions], EvaluateOptions(compute_dtype="float32", device="cpu"))
    assert found.loss < 0.9 * without.loss


def test_the_first_loss_equals_that_of_the_dequantized_model(config, llama_nf4, tmp_path, instructions):
    """A fresh adapter changes nothing, so step 1 has transformers' loss on the same batch, weighted by tokens."""
    from transformers import AutoModelForCausalLM

    from adaptkit.data.dataset import load_data
    from adaptkit.data.sampling import split
    from adaptkit.operations.dequantize import dequantize

    train(replace(config, steps=1, dropout=0.0), tmp_path / "adapter")
    first = json.loads((tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()[1])
    dequantize(llama_nf4, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    tokenizer = load_tokenizer(llama_nf4)
    samples, _ = split(load_data([instructions], tokenizer, 1024).samples, 0.1, config.seed)
    total = 0.0
    for (sample,) in Batches(samples, batch_size=config.batch_size, seed=config.seed).rows(0):
        ids, labels = torch.tensor([sample.ids]), torch.tensor([sample.labels])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * sample.answer_tokens
    assert first["loss"] == pytest.approx(total / first["answer_tokens"], rel=2e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer_pages_mib": 0.01, "page_kib": 4},
        *({"checkpointing": policy} for policy in ("sqrt", "none", "segments:1", "budget:5")),
    ],
    ids=["paged", "sqrt", "none", "segments", "budget"],
)
def test_paging_and_checkpointing_do_not_change_the_adapter(config, trained, change, tmp_path):
    report = train(replace(config, **change), tmp_path / "adapter")
    assert report.tensors_root == trained[1].tensors_root
    if "page_kib" in change:
        assert report.paging["slots"] < report.paging["pages"]
        assert report.paging["write_backs"] > 0


def test_a_different_seed_gives_a_different_adapter(config, trained, tmp_path):
    assert train(replace(config, seed=1), tmp_path / "adapter").tensors_root != trained[1].tensors_root


def test_the_manifest_identifies_the_base_by_its_tensors(trained, llama_nf4):
    base, adapter = require_manifest(llama_nf4), require_manifest(trained[0])
    assert adapter.parents[0].tensors_root == base.tensors_root
    assert adapter.parents[0].manifest_sha256 == base.sha256
    assert {t.module: t.base_xxh3_128 for t in adapter.targets} == {t.module: t.base_xxh3_128 for t in base.targets}
    assert set(read_adapter(trained[0]).modules) == {target.module for target in base.targets}


def arguments(config, output):
    shown = [
        "train", "--base", config.base, "--data", config.data[0], "-o", str(output), "--rank", "4", "--steps", "12",
        "--batch-size", "4", "--learning-rate", "0.005", "--compute-dtype", "float32", "--dropout", "0.1",
        "--save-every", "2", "--device", "cpu",
    ]  # fmt: skip
    return [sys.executable, "-m", "adaptkit.cli.main", *shown]


def test_a_killed_run_is_resumed_by_a_new_process_to_the_same_bytes(config, trained, tmp_path):
    """tests/faults/test_kill_training.py kills at more moments, but forks processes with the same hash seed."""
    output = tmp_path / "adapter"
    partial = output.with_name("adapter.partial")
    process = subprocess.Popen(arguments(config, output), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not any((partial / f"checkpoint-{step}").exists() for step in range(4, 13, 2)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not output.exists()
    done = subprocess.run(arguments(config, output), capture_output=True, text=True, check=True)
    assert "resumed from" in done.stdout
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert (output / name).read_bytes() == (trained[0] / name).read_bytes()


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(config, trained, tmp_path, capsys):
    output = tmp_path / "adapter"
    saving = replace(config, save_every=4)
    stop_after(saving, output, 10)
    state = output.with_name("adapter.partial") / "checkpoint-10" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"\xff")
    report = train(saving, output)
    assert report.resumed_from == 8
    assert report.tensors_root == trained[1].tensors_root
    assert "checkpoint-10 is damaged" in capsys.readouterr().err


def test_a_run_resumed_after_its_last_step_reports_no_speed(config, trained, tmp_path):
    stop_after(config, tmp_path / "adapter", config.steps)
    report = train(config, tmp_path / "adapter")
    assert report.resumed_from == report.steps
    assert dict(train_command._rows(report))["speed"] is None
    assert dict(train_command._rows(trained[1]))["speed"].endswith(" tokens/s")


def test_a_budget_reports_its_choice_or_the_smallest_sufficient_budget(config, run_cli, tmp_path):
    arguments = ["train", "--base", config.base, "--data", config.data[0], "-o", tmp_path / "out", "--dry-run"]
    done = run_cli(*arguments, "--checkpointing", "budget:64")
    assert "0 of 2 layers checkpointed" in done.stdout
    done = run_cli(*arguments, "--checkpointing", "budget:1", "--batch-size", 32, "--compute-dtype", "float32")
    assert (done.code, "budget:1 is not enough" in done.stderr) == (2, True)
    least = done.stderr.partition("--checkpointing ")[2].partition(",")[0]
    done = run_cli(*arguments, "--checkpointing", least, "--batch-size", 32, "--compute-dtype", "float32")
    assert (done.code, "the first of 2 layers checkpointed" in done.stdout) == (0, True), done.stderr


def test_a_refused_run_leaves_no_files_and_does_not_block_the_next(config, tmp_path):
    for wrong in ({"targets": ("nope",)}, {"rank": 999}):
        with pytest.raises(UsageError):
            train(replace(config, **wrong), tmp_path / "adapter")
        assert list(tmp_path.iterdir()) == []
    train(replace(config, steps=1), tmp_path / "adapter")


def test_a_run_without_a_checkpoint_does_not_block_a_different_run(config, tmp_path):
    """It was killed before its first checkpoint; its metrics are not mistaken for those of the next run."""
    work = tmp_path / "adapter.partial"

    def kill(report):
        shutil.copytree(work, tmp_path / "killed")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(replace(config, save_every=0), tmp_path / "adapter", on_step=kill)
    shutil.rmtree(work)
    (tmp_path / "killed").rename(work)
    assert (work / "run.json").exists()
    assert (work / "metrics.jsonl").read_bytes()
    other = replace(config, rank=2, steps=2)
    report = train(other, tmp_path / "adapter")
    assert report.resumed_from == 0
    assert report.manifest_sha256 == train(other, tmp_path / "again").manifest_sha256


@pytest.mark.parametrize(
    "name", ["checkpoint-3", "keep-3", "model-00001-of-00009.safetensors", "notes/a.txt", "model.partial"]
)
def test_checkpoints_and_foreign_files_in_the_work_folder_are_not_discarded(name, config, tmp_path):
    """Neither a run with different options nor one that is refused discards them."""
    work = tmp_path / "adapter.partial"
    with Output(tmp_path / "adapter", ["another plan"]):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).mkdir() if name.endswith("-3") else (work / name).write_text("of use")
    before = sorted(work.rglob("*"))
    for wrong in ({}, {"targets": ("nope",)}):
        with pytest.raises(ConflictError, match="unfinished work"):
            train(replace(config, **wrong), tmp_path / "adapter")
        assert sorted(work.rglob("*")) == before


def test_the_reason_of_a_refusal_is_reported_even_if_cleanup_fails(config, tmp_path, monkeypatch):
    def busy(output):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Output, "discard", busy)
    with pytest.raises(UsageError, match="matches no linear layer"):
        train(replace(config, targets=("nope",)), tmp_path / "adapter")


def test_an_unquantized_base_for_qlora_and_an_existing_output_are_refused(config, llama, trained, tmp_path):
    with pytest.raises(UsageError, match="is not quantized, which method qlora requires") as caught:
        train(replace(config, base=str(llama), method="qlora"), tmp_path / "adapter")
    assert "adaptkit quantize" in caught.value.hint
    with pytest.raises(OutputExistsError):
        train(config, trained[0])
    assert not (tmp_path / "adapter").exists()


def test_a_run_refused_before_resuming_does_not_discard_its_checkpoint(config, tmp_path):
    run, output = replace(config, steps=4, save_every=1), tmp_path / "adapter"
    stop_after(run, output, 2)
    for ask in (train, plan_run):
        with pytest.raises(DiskError, match="checkpoints need"):
            ask(replace(run, keep_checkpoints=1 << 40), output)
    with pytest.raises(DiskError, match="checkpoints need"):
        plan_run(replace(run, keep_checkpoints=1 << 40), tmp_path / "absent" / "adapter")
    report = train(run, output)
    assert report.resumed_from == 2


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_paged_run_resumes_with_a_different_budget_to_the_same_adapter(config, optimizer, tmp_path):
    """First the whole state is resident, then no page; in the uninterrupted run some of the pages are."""
    run = replace(config, optimizer=optimizer, steps=4, page_kib=4, optimizer_pages_mib=0.012)
    whole = train(run, tmp_path / "whole")
    assert 0 < whole.paging["resident"] < whole.paging["pages"]
    stop_after(replace(run, optimizer_pages_mib=None), tmp_path / "adapter", 2)
    report = train(replace(run, optimizer_pages_mib=1e-6, page_kib=8), tmp_path / "adapter")
    assert (report.resumed_from, report.paging["resident"]) == (2, 0)
    assert report.tensors_root == whole.tensors_root


def test_metrics_report_resident_pages_and_page_transfers_of_every_step(config, tmp_path):
    """Also in a resumed run: the transfers of a step do not depend on where the process started."""
    run = replace(config, steps=4, page_kib=4, optimizer_pages_mib=0.02)
    whole = train(run, tmp_path / "whole")
    stop_after(run, tmp_path / "adapter", 2)
    train(run, tmp_path / "adapter")
    text = (tmp_path / "adapter" / "metrics.jsonl").read_text()
    assert text == (tmp_path / "whole" / "metrics.jsonl").read_text()
    found = [line["paging"] for line in map(json.loads, text.splitlines()) if "loss" in line]
    assert len(found) == 4
    for paging in found:
        assert (paging["pages"], paging["resident"]) == (whole.paging["pages"], whole.paging["resident"])
        assert paging["faults"] == paging["write_backs"] == paging["pages"] - paging["resident"] > 0


def test_truncated_metrics_are_restored_from_the_checkpoint(config, trained, tmp_path):
    output, saving = tmp_path / "adapter", replace(config, save_every=4)
    stop_after(saving, output, 6)
    live = tmp_path / "adapter.partial" / "metrics.jsonl"
    live.write_bytes(live.read_bytes()[:-7])
    assert train(saving, output).resumed_from == 6
    assert (output / "metrics.jsonl").read_bytes() == (trained[0] / "metrics.jsonl").read_bytes()


def test_non_finite_gradients_stop_the_run_before_any_parameter_changes(config, tmp_path, monkeypatch):
    pairs = []

    def spoil(model, batch, share):
        pairs.extend((value, value.detach().clone()) for value in model.network.parameters() if value.requires_grad)
        loss = summed_loss(model, batch, share)
        loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    monkeypatch.setattr(network_loss, "summed_loss", spoil)
    with pytest.raises(NonFiniteError, match=r"gradient's norm is .* at step 1"):
        train(replace(config, steps=1, held_out=0.0), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert len(pairs) == 2 * 14  # A and B of seven layers in each of two blocks
    assert all(torch.equal(value, before) for value, before in pairs)


def test_the_manifest_records_the_hash_of_the_data(trained, instructions):
    expected = hashlib.sha256(instructions.read_bytes()).hexdigest()
    assert require_manifest(trained[0]).operation["options"]["data_sha256"] == [expected]


def test_a_base_without_a_manifest_is_identified_by_its_tensors(config, llama_nf4, copy_of, tmp_path):
    base = copy_of(llama_nf4)
    (base / MANIFEST_NAME).unlink()
    train(replace(config, base=str(base), steps=1), tmp_path / "adapter")
    manifest, known = require_manifest(tmp_path / "adapter"), require_manifest(llama_nf4)
    (parent,) = manifest.parents
    assert (parent.role, parent.manifest_sha256) == ("base", None)
    assert parent.tensors_root == known.tensors_root
    assert manifest.targets == tuple(replace(target, base_xxh3_128=None) for target in known.targets)


def test_a_merged_adapter_of_conv1d_layers_has_the_loss_of_the_unmerged_one(config, gpt2, instructions, tmp_path):
    """The attention's c_proj is square, so only the loss reveals a transposed change."""
    quantize(gpt2, tmp_path / "nf4")
    on_gpt2 = replace(config, base=str(tmp_path / "nf4"), targets=("*.attn.c_proj",), steps=8)
    train(on_gpt2, tmp_path / "adapter")
    merge(gpt2, [tmp_path / "adapter"], tmp_path / "merged")
    options = EvaluateOptions(compute_dtype="float32", device="cpu")
    base, adapted = (evaluate(gpt2, adapter, [instructions], options).loss for adapter in (None, tmp_path / "adapter"))
    merged = evaluate(tmp_path / "merged", None, [instructions], options).loss
    assert adapted < base - 0.01
    assert merged == pytest.approx(adapted, abs=1e-4)


def test_a_base_that_differs_from_its_manifest_is_refused_before_anything_is_written(config, copy_of, tmp_path):
    base = copy_of(Path(config.base))
    weights = base / "model.safetensors"
    flip(weights, -100)
    with pytest.raises(IntegrityError, match="differs from its fingerprint"):
        train(replace(config, base=str(base)), tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == [base.name]


def test_a_base_whose_index_names_a_shard_that_its_manifest_does_not_is_refused(config, llama, tmp_path):
    """The shards that the manifest lists are all there, and as they were."""
    base = tmp_path / "base"
    quantize(llama, base, QuantizeOptions(max_shard_bytes=1))
    index = base / "model.safetensors.index.json"
    name = "model.norm.weight"
    shard = json.loads(index.read_text())["weight_map"][name]
    save_file({name: torch.zeros_like(load_file(base / shard)[name])}, base / "other.safetensors")
    index.write_text(index.read_text().replace(shard, "other.safetensors"))
    with pytest.raises(IntegrityError, match=rf"tensor {name} is not in {shard} as the manifest says"):
        train(replace(config, base=str(base)), tmp_path / "adapter")


def test_the_initial_adapter_cannot_be_the_output_or_contain_it(config, trained, copy_of):
    first = copy_of(trained[0])
    on_it = replace(config, init=str(first), rank=16)
    for output in (first, first / "second"):
        with pytest.raises(UsageError, match="would change its own input"):
            train(on_it, output, force=True)
    verify(first)


def test_the_base_is_never_replaced_by_its_adapter(config, llama_nf4, copy_of):
    base = copy_of(llama_nf4)
    before = sorted((path.name, path.read_bytes()) for path in base.iterdir())
    with pytest.raises(UsageError, match="would change its own input"):
        train(replace(config, base=str(base)), base, force=True)
    assert sorted((path.name, path.read_bytes()) for path in base.iterdir()) == before
