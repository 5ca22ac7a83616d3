"""What a run does besides steps: early stopping, skipping, sampling, tracking, plotting, planning, resuming."""

import json
import math
import re
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
import torch
from folders import edit_json, edited_tensors
from forks import Forks
from interrupted import stop_after
from safetensors.torch import load_file

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.hashing import file_sha256, fingerprint, fingerprint_in_pieces
from adaptkit.checkpoint.manifest import MANIFEST_NAME, require_manifest
from adaptkit.checkpoint.writer import DiskError
from adaptkit.data.batches import Batches
from adaptkit.data.limits import pad_id
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import ConflictError, NonFiniteError, OutputExistsError, UsageError
from adaptkit.numerics.tensors import as_array
from adaptkit.operations.quantize import quantize
from adaptkit.operations.verify import verify
from adaptkit.training import loop, result, run
from adaptkit.training.config import TrainConfig
from adaptkit.training.device import deterministic
from adaptkit.training.distributed import World
from adaptkit.training.dry_run import plan_run
from adaptkit.training.evaluation.evaluate import EvaluateOptions, evaluate
from adaptkit.training.gradients import Gradients
from adaptkit.training.inputs import read_inputs
from adaptkit.training.loop import train
from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.preparation import batches_of, build
from adaptkit.training.resume import require_room
from adaptkit.wording import size


@pytest.fixture(scope="module")
def config(llama_nf4, instructions):
    return TrainConfig(
        base=str(llama_nf4), data=(str(instructions),), rank=4, steps=8, batch_size=4, learning_rate=5e-3, warmup=0.0,
        compute_dtype="float32", dropout=0.1, save_every=0, device="cpu",
    )  # fmt: skip


def metrics(folder, key):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


# Gradients


@pytest.fixture(scope="module")
def gradient_of(config, tmp_path_factory):
    inputs = read_inputs(replace(config, dropout=0.0), tmp_path_factory.mktemp("none") / "adapter", False)
    model, _ = build(inputs, World(torch.device("cpu")), batches_of(inputs).largest())
    for layer in model.adapted().values():
        torch.nn.init.normal_(layer.lora_b, std=0.02, generator=torch.Generator().manual_seed(1))
    trainable = Trainable.of(model)
    gradients = Gradients(model, trainable.gradients, inputs.config, World(torch.device("cpu")))

    def gradient(size, batch_size=8):
        padding = pad_id(inputs.tokenizer, inputs.base)
        batches = Batches(inputs.samples, batch_size=batch_size, micro_batch_size=size, padding=padding)
        weight = sum(sample.answer_tokens for row in batches.rows(1) for sample in row)
        loss = gradients.collect(batches.micro_batches(1), weight, 1)["loss"]
        return loss, trainable.gradients.clone()

    return gradient


@pytest.mark.parametrize("size", [1, 3])
def test_any_micro_batch_size_gives_the_same_loss_and_gradient(gradient_of, size):
    """Samples differ in length, so a mean over micro-batches instead of tokens would show."""
    whole_loss, whole = gradient_of(None)
    loss, parts = gradient_of(size)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert (parts - whole).norm() < 2e-6 * whole.norm()
    assert torch.equal(gradient_of(size)[1], parts)


# Non-finite values


def confirm(base, digest):
    """Update the manifest to a changed base, which would be refused otherwise."""
    manifest = require_manifest(base)
    files = [
        replace(record, size=(base / record.path).stat().st_size, sha256=file_sha256(base / record.path))
        for record in manifest.files
    ]
    tensors = [
        replace(record, xxh3_128=digest) if record.name == "model.embed_tokens.weight" else record
        for record in manifest.tensors
    ]
    changed = replace(manifest, files=tuple(files), tensors=tuple(tensors))
    (base / MANIFEST_NAME).write_bytes(changed.to_bytes())


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A model with an infinite embedding of one letter, and data with that letter in one line."""
    folder = tmp_path_factory.mktemp("poisoned")
    quantize(tiny.write_llama(folder / "plain", tied=False), folder / "nf4")
    (letter,) = load_tokenizer(folder / "plain")("Z")["input_ids"]
    with edited_tensors(folder / "nf4" / "model.safetensors") as tensors:
        tensors["model.embed_tokens.weight"][letter] = math.inf
    confirm(folder / "nf4", fingerprint(as_array(tensors["model.embed_tokens.weight"])))
    lines = tiny.write_instructions(folder / "rows.jsonl", rows=12).read_text().splitlines()
    lines[7] = json.dumps({"instruction": "Z", "context": "", "output": "quiet"})
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def on_poisoned(config, poisoned):
    return replace(
        config, base=str(poisoned / "nf4"), data=(str(poisoned / "rows.jsonl"),), batch_size=3, steps=4, held_out=0.0
    )


def test_a_non_finite_loss_is_reported_with_step_file_and_line(on_poisoned, tmp_path):
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step \d: .*rows.jsonl, line 8") as caught:
        train(replace(on_poisoned, micro_batch_size=1), tmp_path / "adapter")
    assert caught.value.message.count("rows.jsonl") == 1  # the micro-batch, not the whole batch
    assert "--on-non-finite skip" in caught.value.hint
    assert "--force" in caught.value.hint  # other options cannot resume the run
    assert not (tmp_path / "adapter").exists()


def test_the_optimizer_never_sees_a_skipped_step(on_poisoned, tmp_path):
    """A run that ends with the skipped step gives the same adapter as one that ends before it."""
    skipping, notes = replace(on_poisoned, on_non_finite="skip"), []
    report = train(skipping, tmp_path / "whole", note=notes.append)
    (step,) = metrics(tmp_path / "whole", "skipped")
    assert (report.skipped, report.steps) == (1, 4)
    assert "rows.jsonl, line 8" in metrics(tmp_path / "whole", "skipped")[step]
    assert str(tmp_path.parent) not in (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert [note for note in notes if note.startswith(f"warning: skipped step {step}")]
    assert step not in metrics(tmp_path / "whole", "loss")
    assert all(torch.isfinite(term.lora_b).all() for term in read_adapter(tmp_path / "whole").modules.values())
    assert step > 1, "choose another seed: then there is a step before it"
    through = train(replace(skipping, steps=step), tmp_path / "through")
    before = train(replace(skipping, steps=step - 1), tmp_path / "before")
    assert through.tensors_root == before.tensors_root


def test_skipping_stops_after_five_non_finite_steps_in_a_row(on_poisoned, tmp_path):
    broken = replace(on_poisoned, on_non_finite="skip", learning_rate=1e30, max_grad_norm=0.0, steps=20)
    with pytest.raises(NonFiniteError, match="the last of 5 such steps in a row"):
        train(broken, tmp_path / "adapter", note=lambda text: None)


def test_a_run_that_stopped_at_a_non_finite_loss_can_resume_and_skip_it(on_poisoned, tmp_path):
    with pytest.raises(NonFiniteError):
        train(replace(on_poisoned, save_every=1), tmp_path / "stopped")
    skipping = replace(on_poisoned, save_every=1, on_non_finite="skip")
    report = train(skipping, tmp_path / "stopped", note=lambda text: None)
    assert report.resumed_from > 0
    whole = train(skipping, tmp_path / "whole", note=lambda text: None)
    assert report.tensors_root == whole.tensors_root


# Measurements between steps


def test_evaluation_batches_are_no_larger_than_micro_batches(config, tmp_path):
    seen = []

    def look(module, inputs):
        if isinstance(module, torch.nn.Embedding):
            seen.append(inputs[0].shape[0])

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        train(replace(config, steps=1, batch_size=8, micro_batch_size=2, held_out=0.4), tmp_path / "adapter")
    finally:
        hook.remove()
    assert max(seen) == 2


# Inputs that are refused


@pytest.mark.parametrize("asked", [{"sample_tokens": 10_000}, {"sample_prompts": ("word " * 3000,)}])
def test_sample_prompts_longer_than_the_context_are_refused_before_the_first_step(config, tmp_path, asked):
    with pytest.raises(UsageError, match="are longer than the model's context of "):
        train(replace(config, **{"sample_prompts": ("hi",), **asked}), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_tokens_outside_the_models_vocabulary_are_refused_before_the_first_step(
    llama, copy_of, instructions, run_cli, tmp_path
):
    model = copy_of(llama)
    tokenizer = load_tokenizer(llama)
    known = json.loads((llama / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<|new-{number}|>" for number in range(known - len(tokenizer) + 1)])
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(model)
    row = {"instruction": f"<|new-{known - len(load_tokenizer(llama))}|>", "output": "y"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    given, asked = ["--data", tmp_path / "rows.jsonl"], ["--sample-prompts", row["instruction"]]
    for command in (
        ["train", "--base", model, *given, "-o", tmp_path / "out", "--held-out", 0],
        ["train", "--base", model, "--data", instructions, "-o", tmp_path / "out", *asked],
        ["evaluate", "--base", model, *given],
        ["evaluate", "--base", model, "--data", instructions, "--shots", 1, "--shots-from", tmp_path / "rows.jsonl"],
        ["evaluate", "--base", model, "--prompt", row["instruction"]],
    ):
        done = run_cli(*command)
        assert (done.code, "Traceback" in done.stderr) == (2, False)
        assert f"the tokenizer produces token {known}, but the model's vocabulary has {known}" in done.stderr
    told = evaluate(model, None, (instructions,), EvaluateOptions(device="cpu", compute_dtype="float32"))
    same = evaluate(llama, None, (instructions,), EvaluateOptions(device="cpu", compute_dtype="float32"))
    assert told.loss == same.loss  # although the padding token is not in the model's vocabulary


# Best and last adapter, early stopping


@pytest.fixture(scope="module")
def overshooting(config):
    return replace(config, learning_rate=0.1, eval_every=2, patience=2, steps=40)


@pytest.fixture(scope="module")
def stopped(overshooting, tmp_path_factory):
    output = tmp_path_factory.mktemp("stopped") / "adapter"
    return output, train(overshooting, output, note=lambda text: None)


def test_a_run_stops_after_patience_measurements_without_improvement(stopped):
    output, report = stopped
    losses = metrics(output, "held_out_loss")
    del losses[0]
    best = min(losses, key=losses.get)
    assert 0 < best < report.steps < 40
    assert report.kept_step == best
    assert report.steps == best + 2 * 2
    assert report.held_out_after == losses[best]


def test_the_best_and_the_last_adapter_are_published(stopped, overshooting, tmp_path):
    output, report = stopped
    plain = replace(overshooting, patience=0, eval_every=0, keep="last")
    best = train(replace(plain, steps=report.kept_step), tmp_path / "best")
    last = train(replace(plain, steps=report.steps), tmp_path / "last")
    assert report.tensors_root == best.tensors_root
    assert require_manifest(output / "last").tensors_root == last.tensors_root
    assert verify(output).kind == verify(output / "last").kind == "adapter"
    kept = train(replace(overshooting, keep="last"), tmp_path / "kept", note=lambda text: None)
    assert kept.tensors_root == last.tensors_root
    assert require_manifest(tmp_path / "kept" / "best").tensors_root == best.tensors_root


def test_a_run_interrupted_after_every_step_gives_the_same_result(stopped, overshooting, tmp_path):
    """Best adapter, patience and history are restored from the checkpoint."""
    output = tmp_path / "adapter"

    def cut(report):
        raise KeyboardInterrupt

    for _ in range(stopped[1].steps):
        with pytest.raises(KeyboardInterrupt):
            train(overshooting, output, on_step=cut, note=lambda text: None)
    report = train(overshooting, output, note=lambda text: None)
    assert report.manifest_sha256 == stopped[1].manifest_sha256  # of every file


# Samples, trackers and plots


def test_sampled_answers_equal_those_of_an_evaluation_of_the_adapter(config, llama_nf4, tmp_path):
    prompts, notes = ("Tell me about birds.", "hello"), []
    shown = replace(config, sample_prompts=prompts, sample_every=3, sample_tokens=6, learning_rate=0.02)
    train(shown, tmp_path / "adapter", note=notes.append)
    answers = metrics(tmp_path / "adapter", "answers")
    assert sorted(answers) == [3, 6, 8]
    options = EvaluateOptions(prompts=prompts, max_new_tokens=6, compute_dtype="float32", device="cpu")
    assert answers[8] == evaluate(llama_nf4, tmp_path / "adapter", options=options).answers
    assert notes[-1] == f"step 8: 'hello' -> {answers[8]['hello']!r}"


def numbers(folder):
    """Return every series of numbers in the metrics, by name and step."""
    found = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, {})[line["step"]] = value
    assert found.keys() >= {"loss", "held_out_loss", "learning_rate", "grad_norm", "tokens", "answer_tokens"}
    return found


def test_tensorboard_receives_the_numbers_and_answers_of_the_metrics(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = replace(
        config, tensorboard=str(tmp_path / "board"), eval_every=4, sample_prompts=("hello",), sample_tokens=3
    )
    train(shown, tmp_path / "adapter", note=lambda text: None)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    expected = numbers(tmp_path / "adapter")
    assert sorted(events.Tags()["scalars"]) == sorted(expected)
    for name, values in expected.items():
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(values, rel=1e-6), name
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("hello/text_summary")}
    answers = metrics(tmp_path / "adapter", "answers")
    assert {step: {"hello": text} for step, text in texts.items()} == answers != {}
    plain = train(replace(shown, tensorboard=None), tmp_path / "plain", note=lambda text: None)
    assert plain.manifest_sha256 == require_manifest(tmp_path / "adapter").sha256


def command(config, output, *more):
    shown = [
        "train", "--base", config.base, "--data", config.data[0], "-o", str(output), "--rank", "4", "--steps", "8",
        "--batch-size", "4", "--learning-rate", "0.005", "--warmup", "0", "--compute-dtype", "float32",
        "--dropout", "0.1", "--save-every", "0", "--device", "cpu",
    ]  # fmt: skip
    return [*shown, *more]


def test_weights_and_biases_receives_the_numbers_and_answers_of_the_metrics_offline(config, run_cli, tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    more = ("--wandb", "p", "--eval-every", "4", "--sample-prompts", "hello", "--sample-tokens", "3")
    done = run_cli(*command(config, tmp_path / "adapter", *more), cwd=tmp_path, WANDB_MODE="offline")
    said = [line for line in done.stderr.splitlines() if not line.startswith("wandb: ")]  # early versions warn
    assert (done.code, len(said)) == (0, 1), done.stderr
    assert said[0].startswith("step 8: 'hello' -> ")
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found = {}
    for data in log_records(log.read_bytes()):
        items = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in Record.FromString(data).history.item}
        for name, value in items.items():
            if not name.startswith("_"):  # W&B's own
                found.setdefault(name, {})[items["_step"]] = value
    answers = metrics(tmp_path / "adapter", "answers")
    texts = {"answer to 'hello'": {step: said["hello"] for step, said in answers.items()}}
    assert found == numbers(tmp_path / "adapter") | texts


def log_records(content):
    """Yield records of LevelDB's log format, after W&B's header: 32 KiB blocks: crc (4), length (2), type (1), data."""
    position, parts = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_an_output_folder_that_appears_during_a_run_loses_no_work(config, tmp_path):
    """Checkpoints stay; once that folder is removed, the same command publishes from that of the last step."""
    out = tmp_path / "adapter"
    with pytest.raises(OutputExistsError, match="already exists"):
        train(config, out, on_step=lambda step: (out / "theirs").mkdir(parents=True, exist_ok=True))
    (out / "theirs").rmdir()
    assert train(config, out).resumed_from == config.steps


def test_a_tensorboard_folder_inside_the_output_is_refused(config, tmp_path):
    for folder in ("adapter", "adapter/logs"):
        with pytest.raises(UsageError, match="is inside the output folder"):
            train(replace(config, tensorboard=str(tmp_path / folder)), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_tensorboard_folder_inside_an_artifact_is_refused(run_cli, config, tmp_path, dry_run):
    logs = Path(config.base) / "logs"
    done = run_cli(*command(config, tmp_path / "adapter", "--tensorboard", logs, *dry_run))
    assert (done.code, done.stdout) == (2, "")
    assert "is inside the artifact" in done.stderr
    assert not logs.exists()
    assert list(tmp_path.iterdir()) == []


MAIN = "from adaptkit.cli.main import main; main()"
ABSENT = ("matplotlib", "tensorboard", "wandb")
WITHOUT = f"""
import sys

sys.modules.update(dict.fromkeys({ABSENT}))  # imports of them fail
import adaptkit.cli.main
import transformers.models.llama.modeling_llama
import adaptkit.training.evaluation.evaluate, adaptkit.training.loop
"""


@pytest.fixture(scope="module")
def without():
    """Run a command without a package, in a fork of a process in which none of them is installed."""
    with Forks(WITHOUT) as run:

        def without_one(absent, *arguments):
            others = set(ABSENT) - {absent}
            return run(f"import sys; [*map(sys.modules.pop, {others})]; {MAIN}", *arguments)

        yield without_one


def test_a_missing_package_is_reported_with_how_to_install_it(config, without, tmp_path):
    training = command(config, tmp_path / "adapter")
    for absent, problem, extra, shown in (
        ("tensorboard", "--tensorboard: the package is not installed", "track", [*training, "--tensorboard", "x"]),
        ("wandb", "--wandb: the package is not installed", "track", [*training, "--wandb", "x"]),
    ):
        done = without(absent, *shown)
        assert done.returncode == 2
        assert done.stderr == f"error: {problem}\nhint: pip install '.[{extra}]' in adaptkit's checkout\n"
        assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_start_is_reported_without_a_traceback(config, run_cli, tmp_path):
    (tmp_path / "file").write_text("")
    done = run_cli(*command(config, tmp_path / "a", "--tensorboard", tmp_path / "file"))
    assert (done.code, len(done.stderr.splitlines())) == (2, 2)
    assert done.stderr.startswith(f"error: --tensorboard: {tmp_path / 'file'}: ")
    shown = command(config, tmp_path / "b", "--wandb", "p")
    done = run_cli(*shown, cwd=tmp_path, WANDB_MODE="online", WANDB_API_KEY="", HOME=str(tmp_path))
    assert (done.code, done.stderr.splitlines()[-1]) == (2, "hint: run wandb login, or set WANDB_MODE=offline")
    assert "Traceback" not in done.stderr


def test_the_plot_has_all_labels_and_is_omitted_with_a_note_without_matplotlib(config, without, tmp_path):
    train(replace(config, eval_every=4), tmp_path / "adapter")
    texts = "".join(ElementTree.parse(tmp_path / "adapter" / "loss.svg").getroot().itertext())
    assert all(word in texts for word in ("training", "held out", "step", "learning rate"))
    done = without("matplotlib", *command(config, tmp_path / "plain"))
    assert done.returncode == 0, done.stderr
    assert "no loss.svg: matplotlib is not installed (pip install '.[report]' in adaptkit's checkout)" in done.stderr
    assert not (tmp_path / "plain" / "loss.svg").exists()


# Plans and resuming


def test_a_plan_predicts_the_run_and_writes_nothing(config, run_cli, tmp_path):
    planned = replace(config, eval_every=3, steps=None, epochs=2.0)
    plan = train(planned, str(tmp_path / "adapter"), dry_run=True)
    assert not list(tmp_path.iterdir())
    report = train(planned, tmp_path / "adapter", note=lambda text: None)
    for name in ("output", "steps", "samples", "trainable_parameters", "segments", "truncated", "dropped"):
        assert getattr(plan, name) == getattr(report, name), name
    tokens = metrics(tmp_path / "adapter", "tokens")
    assert sum(tokens.values()) == 2 * plan.tokens  # two whole passes
    assert sum(metrics(tmp_path / "adapter", "answer_tokens").values()) == 2 * plan.answer_tokens
    done = run_cli(*command(config, tmp_path / "other", "--dry-run", "--json"))
    assert json.loads(done.stdout)["steps"] == 8
    assert not (tmp_path / "other.partial").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"checkpointing": "none", "optimizer": "adamw8bit"},
        {"checkpointing": "layer", "page_kib": 4, "optimizer_pages_mib": 0.01},
        {"optimizer": "adamw8bit", "page_kib": 4, "optimizer_pages_mib": 0.02, "rank": 2},
        {"eval_every": 3},
        {"eval_every": 8},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_a_plan_predicts_the_memory_that_the_run_reports(settings, config, tmp_path):
    planned = replace(config, **settings)
    plan_run(planned, tmp_path / "adapter")  # the first measurement in a process counts 9 kB that stay cached
    plan = plan_run(planned, tmp_path / "adapter")
    report = train(planned, tmp_path / "adapter", note=lambda text: None)
    assert plan.predicted_bytes == report.memory["predicted"]
    assert report.memory["optimizer"] == report.paging["slots"] * report.paging["page_bytes"]
    vectors = 2 if planned.eval_every == 3 else 1  # the parameters, and the best ones so far
    assert report.memory["trainable"] == vectors * report.memory["gradients"] == vectors * 4 * plan.trainable_parameters
    assert plan.free_bytes > plan.predicted_bytes


def test_a_plan_measures_layers_with_the_kernels_of_the_run(config, tmp_path):
    seen = []

    def look(module, inputs):
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.get_deterministic_debug_mode()))

    found = []
    with torch.nn.modules.module.register_module_forward_pre_hook(look):
        for begin in (plan_run, train):
            begin(replace(config, checkpointing="layer", deterministic=True, steps=1), tmp_path / "adapter")
            found.append(set(seen))
            seen.clear()
    assert found == [{(False, 2)}] * 2


def test_a_plan_does_not_predict_the_memory_of_a_process_with_a_sharded_base(config, run_cli, tmp_path):
    plan = plan_run(replace(config, shard_base=True, checkpointing="layer"), tmp_path / "adapter")
    assert (plan.predicted_bytes, plan.free_bytes) == (None, None)
    told = [run_cli(*command(config, tmp_path / "a", "--dry-run", *more)).stdout for more in ((), ("--shard-base",))]
    assert [bool(re.search(r"\nmemory +[0-9.]+ [kM]B predicted, [0-9.]+ GB free\n", text)) for text in told] == [1, 0]


def test_a_run_that_needs_more_memory_than_is_free_says_so(config, tmp_path, monkeypatch):
    """A system that kills it would not say why. On a GPU the error names the cause."""
    plan_run(config, tmp_path / "first")  # the first probe of a process measures a few KB more
    plan = plan_run(config, tmp_path / "adapter")
    for free, warns in ((plan.predicted_bytes - 1, True), (plan.predicted_bytes, False), (None, False)):
        notes = []
        monkeypatch.setattr(run, "free_memory", lambda device, free=free: free)
        train(replace(config, steps=1), tmp_path / "adapter", note=notes.append, force=True)
        told = [note for note in notes if note.startswith("warning: the run needs about ")]
        assert len(told) == warns
        assert all(f"and {size(free)} are available" in note for note in told)


def test_a_plan_for_a_sharded_base_refuses_offloading_on_a_cpu_as_the_run_does(config, tmp_path):
    """Although the plan itself is made on the CPU, without offloading."""
    divided = replace(config, shard_base=True, checkpointing="layer")
    assert plan_run(divided, tmp_path / "adapter").checkpointing == "2 of 2 layers checkpointed"
    with pytest.raises(UsageError, match=r"^offload_checkpoints: needs a GPU"):
        plan_run(replace(divided, offload_checkpoints=True), tmp_path / "adapter")


def test_a_plan_resumes_from_the_same_checkpoint_as_the_run(config, run_cli, tmp_path):
    """Also if checkpoints are damaged or belong to a different run."""
    saving, output = replace(config, save_every=1, keep_checkpoints=3), tmp_path / "adapter"
    assert plan_run(saving, output).resumed_from == 0
    stop_after(saving, output, 4)
    assert plan_run(saving, output).resumed_from == 4
    assert plan_run(replace(saving, rank=8), output, force=True).resumed_from == 0
    for damaged, left in ((4, 3), (3, 2)):
        state = tmp_path / "adapter.partial" / f"checkpoint-{damaged}" / "state.safetensors"
        state.write_bytes(state.read_bytes()[:-1] + b"\xff")
        assert plan_run(saving, output, resume=True).resumed_from == left
    shown = run_cli(*command(saving, output, "--dry-run"))
    assert re.search(r"resumes from +step 2\n", shown.stdout)
    assert train(saving, output, note=lambda text: None).resumed_from == 2


@pytest.mark.parametrize("settings", [{}, {"eval_every": 1}])
def test_a_plan_predicts_the_size_of_a_checkpoint(settings, config, tmp_path):
    config = replace(config, learning_rate=1.0, **settings)  # too high: the best parameters are not the last
    plan = plan_run(config, tmp_path / "adapter")
    stop_after(config, tmp_path / "adapter", 3)
    state = tmp_path / "adapter.partial" / "checkpoint-3" / "state.safetensors"
    assert plan.checkpoint_bytes <= state.stat().st_size <= plan.checkpoint_bytes + 1000


def test_checkpoints_that_do_not_fit_on_the_disk_are_refused(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_room(tmp_path, free // 4, 2)
    with pytest.raises(DiskError, match="its checkpoints need") as caught:
        require_room(tmp_path, free // 2, 2)
    assert "--keep-checkpoints 1" in caught.value.hint
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    require_room(tmp_path, free // 2, 2)  # two are there already: only the next one needs room


def test_a_conflict_with_a_different_run_names_the_differences(config, tmp_path):
    output = tmp_path / "adapter"
    stop_after(config, output, 2)
    for change, words in (
        ({"rank": 8}, "rank was 4 and is 8"),
        ({"rank": 8, "seed": 3}, "rank was 4 and is 8; seed was 0 and is 3"),
        ({"targets": ("q_proj",)}, r'targets was \["\*"\] and is \["q_proj"\]'),
        ({"rank_pattern": {"q_proj": 2}}, r'rank_pattern was not set and is \[\["q_proj", 2\.0\]\]'),
    ):
        with pytest.raises(ConflictError, match=words) as caught:
            train(replace(config, **change), output)
        assert "--force" in caught.value.hint
    rows = tiny.write_instructions(tmp_path / "rows.jsonl", seed=9)
    with pytest.raises(ConflictError, match="another data"):
        train(replace(config, data=(str(rows),)), output)
    assert train(config, output).resumed_from == 2


def test_a_changed_chat_template_prevents_resuming_even_if_the_tokens_are_the_same(config, tmp_path):
    """The template is saved with the adapter."""
    output, template = tmp_path / "adapter", tmp_path / "template.jinja"
    with_template = replace(config, chat_template=str(template))
    said = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    template.write_text(said)
    stop_after(with_template, output, 2)
    template.write_text(said + "{% if tools %}{{ tools | tojson }}{% endif %}")
    with pytest.raises(ConflictError, match=r"(?m)of another run: another chat template$"):
        train(with_template, output)
    template.write_text(said)
    assert train(with_template, output).resumed_from == 2


def test_a_failing_tracker_loses_no_step(config, tmp_path, monkeypatch):
    def add(line):
        if line["step"] == 3:
            raise OSError("the tracker's disk is full")

    @contextmanager
    def broken(*_):
        yield [add]

    with monkeypatch.context() as patched:
        patched.setattr(loop, "trackers", broken)
        with pytest.raises(OSError, match="the tracker's disk"):
            train(config, tmp_path / "adapter")
    report = train(config, tmp_path / "adapter")
    assert report.resumed_from == 3
    assert report.tensors_root == train(config, tmp_path / "whole").tensors_root


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"checkpointing": "sqr"},
            "checkpointing: must be auto, none, layer, sqrt, segments:K or budget:MIB, found 'sqr'",
        ),
        (
            {"checkpointing": "segments:0"},
            "checkpointing: must be auto, none, layer, sqrt, segments:K or budget:MIB, found 'segments:0'",
        ),
        ({"offload_checkpoints": True}, "offload_checkpoints: needs a GPU; on a CPU, checkpoints are in host memory"),
    ],
)
def test_option_errors_are_reported_before_the_base_is_read(config, tmp_path, changes, message):
    """The base's weights are damaged, which is found only by reading all of them."""
    shutil.copytree(config.base, tmp_path / "base")
    shard = next((tmp_path / "base").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(UsageError, match=f"^{message}"):
        train(replace(config, base=str(tmp_path / "base"), **changes), tmp_path / "adapter")


def test_weights_of_a_base_without_a_manifest_are_fingerprinted_once(llama, config, tmp_path, monkeypatch):
    """Here both the best and the last adapter are written."""
    read = Counter()

    def counted(checkpoint, name):
        read[name] += 1
        return fingerprint_in_pieces(checkpoint, name)

    monkeypatch.setattr(result, "fingerprint_in_pieces", counted)
    run = replace(config, base=str(llama), eval_every=1, learning_rate=1e2, max_grad_norm=0.0, keep="last")
    train(run, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "best").is_dir()
    assert set(read.values()) == {1}
    targets = require_manifest(tmp_path / "adapter").targets
    assert {t.module: t.base_xxh3_128 for t in targets} == {
        t.module: fingerprint(as_array(load_file(llama / "model.safetensors")[f"{t.module}.weight"])) for t in targets
    }


def rows_of(path, *lines):
    path.write_text("".join(lines))
    return str(path)


def test_the_same_rows_divided_differently_between_files_are_different_data(config, instructions, tmp_path):
    """Rows move between training and held-out data, or between two files of a mixture."""
    lines = instructions.read_text().splitlines(keepends=True)

    def files(border):
        first = rows_of(tmp_path / f"first-{border}.jsonl", *lines[:border])
        return first, rows_of(tmp_path / f"second-{border}.jsonl", *lines[border:])

    for name, made in (
        ("held-out", lambda first, second: {"data": (first,), "held_out_data": (second,), "held_out": 0.0}),
        ("mixture", lambda first, second: {"data": (first, second), "mixture": {second: 2}, "held_out": 0.0}),
    ):
        stop_after(replace(config, **made(*files(20))), tmp_path / name, 2)
        with pytest.raises(ConflictError, match="another data"):
            train(replace(config, **made(*files(22))), tmp_path / name)


def test_at_most_a_thousand_rows_are_held_out_unless_a_fraction_is_given(config, tmp_path, run_cli):
    rows = tmp_path / "rows.jsonl"
    config = replace(config, data=(str(rows),), steps=1)
    for count, given, samples in (
        (10_000, None, 9000),
        (10_001, 0.1, 9001),
        (12_000, None, 11_000),
        (12_000, 0.1, 10_800),
    ):
        rows.write_text("".join(json.dumps({"text": f"{number}"}) + "\n" for number in range(count)))
        options = ["--held-out", given] if given else []
        done = run_cli(*command(config, tmp_path / "out"), *options, "--dry-run")
        shown = [" ".join(line.split()) for line in done.stdout.splitlines()]
        assert f"samples {samples} to train on, {count - samples} held out" in shown, done.stderr
        said = "held out 1,000 rows and not a tenth of them, as --held-out is not given"
        assert (said in shown) == (samples == 11_000)


def test_a_run_that_held_out_a_tenth_of_many_rows_is_resumed_only_with_that_fraction(config, tmp_path):
    """As one that was begun before there was a maximum; one on few rows had the same fraction as it has today."""
    data = rows_of(tmp_path / "rows.jsonl", *(json.dumps({"text": f"{row}"}) + "\n" for row in range(10_020)))
    config, output = replace(config, data=(data,), steps=2), tmp_path / "many"
    stop_after(replace(config, held_out=0.1), output, 1)
    with pytest.raises(ConflictError, match=r"of another run: held_out was 0.1 and is 0\.0998\d*; another data"):
        train(config, output)
    assert train(replace(config, held_out=0.1), output).resumed_from == 1
    assert require_manifest(output).operation["options"]["held_out"] == 0.1
    few = replace(
        config, data=(rows_of(tmp_path / "few.jsonl", *Path(data).read_text().splitlines(keepends=True)[:50]),)
    )
    stop_after(replace(few, held_out=0.1), tmp_path / "few", 1)
    resumed, whole = (train(few, tmp_path / name) for name in ("few", "whole"))
    assert (resumed.resumed_from, resumed.manifest_sha256) == (1, whole.manifest_sha256)
    assert whole.manifest_sha256 == train(replace(few, held_out=0.1), tmp_path / "given").manifest_sha256


def test_a_config_json_that_differs_from_the_manifest_is_refused(config, copy_of, llama_nf4, tmp_path, run_cli):
    """The tensors match, but the result would name a base that computes something different."""
    base = copy_of(llama_nf4)
    path = base / "config.json"
    edit_json(path, rms_norm_eps=0.5)
    run = run_cli(*command(replace(config, base=str(base)), tmp_path / "adapter"))
    assert run.code == 3
    assert "config.json" in run.stderr
    assert f"adaptkit verify {base}" in run.stderr
    assert not list(tmp_path.glob("adapter*"))


def test_a_method_that_only_a_changed_config_json_excludes_is_not_blamed(config, llama, tmp_path, run_cli):
    base = tmp_path / "base"
    assert run_cli("adopt", llama, "-o", base).code == 0
    edit_json(base / "config.json", quantization_config={"quant_method": "hqq"})
    run = run_cli(*command(replace(config, base=str(base)), tmp_path / "adapter"))
    assert run.code == 3
    assert run.stderr.startswith(f"error: {base}: config.json has ")
    assert not list(tmp_path.glob("adapter*"))


def test_options_that_do_not_affect_the_result_may_change_on_resuming(config, tmp_path):
    whole = train(config, tmp_path / "whole")
    stop_after(config, tmp_path / "adapter", 3)
    other = replace(
        config, save_every=2, keep_checkpoints=1, page_kib=4, optimizer_pages_mib=0.01, checkpointing="none"
    )
    report = train(other, tmp_path / "adapter")
    assert (report.resumed_from, report.tensors_root) == (3, whole.tensors_root)


def test_deterministic_refuses_nondeterministic_operations_and_restores_the_mode():
    pooled, places = torch.nn.functional.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)
    before = torch.get_deterministic_debug_mode()
    try:
        torch.set_deterministic_debug_mode("warn")
        asked = torch.get_deterministic_debug_mode()
        with deterministic(True):
            assert not torch.utils.deterministic.fill_uninitialized_memory
        assert torch.utils.deterministic.fill_uninitialized_memory
        with pytest.raises(RuntimeError, match="max_unpooling2d"), deterministic(True):
            torch.nn.functional.max_unpool2d(pooled, places, 2)
        assert torch.get_deterministic_debug_mode() == asked
        with deterministic(False):
            assert torch.get_deterministic_debug_mode() == asked
        assert torch.get_deterministic_debug_mode() == asked
    finally:
        torch.set_deterministic_debug_mode(before)


def test_deterministic_algorithms_are_enabled_only_during_the_run(config, tmp_path):
    seen = []
    for wanted in (True, False):
        train(
            replace(config, deterministic=wanted, steps=1),
            tmp_path / str(wanted),
            on_step=lambda report: seen.append(torch.are_deterministic_algorithms_enabled()),
        )
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_resuming_without_a_checkpoint_is_an_error(config, tmp_path):
    with pytest.raises(UsageError, match="no checkpoint to resume from"):
        train(config, tmp_path / "adapter", resume=True)
    assert not list(tmp_path.iterdir())
    stop_after(config, tmp_path / "adapter", 1)
    assert train(config, tmp_path / "adapter", resume=True).resumed_from == 1


def test_if_every_checkpoint_is_damaged_resume_fails_and_a_plain_run_starts_over(config, tmp_path):
    stop_after(config, tmp_path / "adapter", 2)
    (state,) = (tmp_path / "adapter.partial").glob("checkpoint-*/state.safetensors")
    state.write_bytes(state.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UsageError, match="no checkpoint to resume from"):
        train(config, tmp_path / "adapter", resume=True)
    assert plan_run(config, tmp_path / "adapter").resumed_from == 0
    notes = []
    assert train(config, tmp_path / "adapter", note=notes.append).resumed_from == 0
    assert [note for note in notes if "checkpoint-2 is damaged" in note and note.endswith("starts over")]


def test_packed_rows_may_be_longer_than_the_models_context(config, gpt2, tmp_path):
    quantize(gpt2, tmp_path / "nf4")
    longest = json.loads((gpt2 / "config.json").read_text())["n_positions"]
    packing = replace(config, base=str(tmp_path / "nf4"), steps=1, pack=True, max_length=2 * longest)
    assert train(packing, tmp_path / "adapter").steps == 1


def test_only_the_newest_checkpoints_are_retained(config, tmp_path):
    stop_after(replace(config, save_every=1, keep_checkpoints=3), tmp_path / "adapter", 7)
    assert sorted(path.name for path in (tmp_path / "adapter.partial").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (5, 6, 7)
    ]


def test_a_run_without_the_fast_parts_learns_the_same_and_resumes_to_the_same_bytes(config, tmp_path):
    """Only rounding differs: the fast parts compute in another order."""
    plain = replace(config, fast=False, compute_dtype="float32", steps=4, save_every=2)
    fast = train(replace(plain, fast=True), tmp_path / "fast")
    report = train(plain, tmp_path / "plain")
    assert report.tensors_root != fast.tensors_root
    one, two = (list(metrics(tmp_path / name, "loss").values()) for name in ("fast", "plain"))
    assert one == pytest.approx(two, rel=1e-4)
    stop_after(plain, tmp_path / "cut", 3)
    with pytest.raises(ConflictError, match="fast"):
        train(replace(plain, fast=True), tmp_path / "cut")
    assert train(plain, tmp_path / "cut").tensors_root == report.tensors_root
    options = require_manifest(tmp_path / "plain").operation["options"]
    assert options["fast"] is False
    assert "fast" not in require_manifest(tmp_path / "fast").operation["options"]
