"""Errors, hints and notes for common mistakes, and for results that may surprise."""

import json
import re
import shutil
from pathlib import Path

import click
import pytest

from adaptkit.cli.commands.evaluate import command as evaluate_command
from adaptkit.cli.commands.plan import command as plan_command
from adaptkit.cli.commands.train import command as train_command
from adaptkit.discovery import closest
from adaptkit.settings import settings
from adaptkit.training.config import COMPUTE_DTYPES, METHODS, OPTIMIZERS, TrainConfig
from adaptkit.training.other_names import OTHER_NAMES
from adaptkit.training.plan_options import PlanOptions

MERGED = Path(__file__).parents[2] / "fixtures" / "golden" / "schema-1-undo-2" / "merged"
NAMES = ["base", "bias", "data", "steps"]


def train(base, instructions, output, *more):
    return ["train", "--base", base, "--data", instructions, "-o", output, "--held-out", 0, "--device", "cpu",
            "--steps", 1, *more]  # fmt: skip


def test_a_base_given_after_the_adapters_gets_a_hint_with_the_right_order(
    run_cli, llama, adapter, second_adapter, tmp_path
):
    done = run_cli("merge", adapter, second_adapter, llama, "-o", tmp_path / "out")
    assert (done.code, done.stdout) == (2, "")
    said = f"{adapter} is an adapter and {llama} a checkpoint; the base comes first"
    assert done.stderr == f"error: {said}\nhint: adaptkit merge {llama} {adapter} -o OUT\n"


@pytest.mark.parametrize("command", [("publish", "org/name", "org/other"), ("verify", ".", "--parents", "org/name")])
def test_a_missing_folder_gets_no_hint_for_python(run_cli, tmp_path, command):
    if command[0] == "verify":
        shutil.copytree(MERGED, tmp_path, dirs_exist_ok=True)
    done = run_cli(*command, cwd=tmp_path)
    what = "org/name: does not exist; expected a checkpoint or adapter folder"
    assert (done.code, done.stderr) == (2, f"error: {what}\nhint: check the path\n")


def test_a_merge_that_gives_the_base_or_little_of_the_change_prints_a_note(run_cli, llama, adapter, tmp_path):
    """Most of a change scaled by 0.001 is below the precision of bfloat16."""
    for name, weight, note in (
        ("zero", 0, "no weight moved: the result is the base"),
        ("weak", 0.001, "half a unit in the weights' last place"),
        ("whole", 1, ""),
    ):
        done = run_cli("merge", llama, adapter, "-o", tmp_path / name, "--weight", weight)
        assert done.code == 0, done.stderr
        notes = [line for line in done.stdout.splitlines() if line.startswith("note")]
        assert [note in line for line in notes] == [True] * bool(note)
        same = (tmp_path / name / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
        assert same == (name == "zero")


def test_training_warns_beforehand_of_adapters_that_cannot_be_merged(run_cli, llama, gpt2, instructions, tmp_path):
    for base, told in ((llama, True), (gpt2, False)):
        asked = train(base, instructions, tmp_path / "trained", "--lora-bias", "--max-length", 64)
        planned = run_cli(*asked, "--dry-run")
        assert planned.code == 0, planned.stderr
        assert ("\nmerge            the adapter cannot be merged: " in planned.stdout) == told
    done = run_cli(*train(llama, instructions, tmp_path / "trained", "--lora-bias"))
    assert "the adapter cannot be merged: 14 of its layers have no bias to add B's to: " in done.stderr
    refused = run_cli("merge", llama, tmp_path / "trained", "-o", tmp_path / "merged")
    assert refused.code != 0
    assert "bias" in refused.stderr


def test_resuming_a_finished_run_says_that_there_is_nothing_to_resume(run_cli, llama, instructions, tmp_path):
    asked = train(llama, instructions, tmp_path / "trained")
    assert run_cli(*asked).code == 0
    for more in (("--resume",), ("--resume", "--dry-run")):
        done = run_cli(*asked, *more)
        assert done.code == 8
        assert "the run that made this is finished; there is nothing to resume\nhint: " in done.stderr
        assert "--force to train again" in done.stderr
    assert "already exists" in run_cli(*asked).stderr


def test_a_missing_options_file_gets_a_hint(run_cli, tmp_path):
    for command in (("run", "nope.yaml"), ("train", "--config", "nope.yaml", "-o", "out")):
        done = run_cli(*command, cwd=tmp_path)
        assert (done.code, done.stdout) == (2, "")
        assert done.stderr.startswith("error: nope.yaml: No such file or directory\nhint: check the path")


def test_plan_accepts_a_config_file_instead_of_a_folder(run_cli, llama):
    of_folder = json.loads(run_cli("plan", llama, "--rank", 2, "--json").stdout)
    assert json.loads(run_cli("plan", llama / "config.json", "--rank", 2, "--json").stdout) == of_folder


def test_plan_notes_rows_longer_than_the_models_context(run_cli, llama, gpt2):
    for model in (llama, gpt2):
        context = json.loads((model / "config.json").read_text())
        most = context.get("max_position_embeddings") or context["n_positions"]
        for length, told in ((most, False), (most + 1, True)):
            printed = run_cli("plan", model, "--method", "lora", "--rank", 2, "--max-length", length).stdout
            assert (f"--max-length {length:,} is longer than the model's context of {most:,} tokens" in printed) == told


def test_plan_says_how_much_of_the_weights_it_does_not_count(run_cli, llama):
    def planned(*options):
        return json.loads(run_cli("plan", llama, "--json", *options).stdout)

    cpu = ("--device", "cpu")
    all_stay, some = (planned(*cpu, *more) for more in (("--checkpointing", "none"), ()))
    released = some["released_bytes"]
    assert some["memory"]["weights"] + released == all_stay["memory"]["weights"]
    assert all_stay["released_bytes"] == planned("--device", "cuda")["released_bytes"] == 0
    assert f", without {released / 1000:.1f} kB released after use\n" in run_cli("plan", llama, *cpu).stdout


@pytest.mark.parametrize(("typed", "hint"), [("quantise", "did you mean 'quantize'?"), ("xyz", "see adaptkit --help")])
def test_a_mistyped_command_gets_the_closest_name_as_a_hint(run_cli, typed, hint):
    done = run_cli(typed, "x")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == f"error: unknown command {typed!r}\nhint: {hint}\n"


def test_of_equally_close_names_the_one_with_the_same_beginning_is_suggested(run_cli, tmp_path):
    (tmp_path / "train.yaml").write_text("bas: model")
    done = run_cli("train", "--config", tmp_path / "train.yaml", "-o", tmp_path / "out")
    assert (done.code, done.stderr.splitlines()[1]) == (2, "hint: did you mean 'base'?")
    assert closest("bas", NAMES) == "base"
    assert closest("bia", NAMES) == "bias"
    assert closest("stepps", NAMES) == "steps"
    assert closest("xyz", NAMES) is None


def test_the_hint_for_a_file_in_place_of_its_folder_names_the_folder(run_cli, llama, adapter, tmp_path):
    (tmp_path / "file").write_text("")
    for file, hint in (
        (llama / "config.json", f"give its folder, {llama}"),
        (adapter / "adapter_model.safetensors", f"give its folder, {adapter}"),
        (tmp_path / "file", "check the path"),
    ):
        done = run_cli("quantize", file, "-o", "out", cwd=tmp_path)
        assert (done.code, done.stdout) == (2, "")
        assert done.stderr == f"error: {file}: is a file; expected a checkpoint or adapter folder\nhint: {hint}\n"


def test_the_hint_for_undoing_what_is_no_merge_is_the_output_of_merge(run_cli, llama, tmp_path):
    """``adopt``, the hint for other commands, would not make it one."""
    done = run_cli("unmerge", llama, "-o", tmp_path / "out")
    assert done.code == 3
    assert done.stderr.splitlines()[1] == "hint: give the output folder of adaptkit merge"


def test_a_size_without_a_unit_is_refused_unless_it_is_large(run_cli, llama, tmp_path):
    def code(size):
        return run_cli("quantize", llama, "-o", tmp_path / "out", "--max-shard-size", size, "--dry-run").code

    assert [code(size) for size in ("5", "0.5", "999999", "1000000", "5B", "5b", "2kb")] == [2, 2, 2, 0, 0, 0, 0]


def test_an_unknown_device_is_refused_with_the_accepted_ones(run_cli, llama, instructions, tmp_path):
    done = run_cli("evaluate", "--base", llama, "--data", instructions, "--device", "gpu")
    assert (done.code, done.stdout) == (2, "")
    said = "--device: must be auto, cpu, cuda or cuda:N, found 'gpu'"
    assert done.stderr == f"error: {said}\nhint: cuda:1 is the second GPU\n"


def test_the_help_of_train_names_every_option_that_is_not_a_file_key():
    others = {option.name: max(option.opts, key=len) for option in train_command.params}
    for name in settings(TrainConfig):
        del others[name]
    named = re.search(r"except (.*); the command line wins", " ".join(train_command.help.split()))[1]
    assert set(re.split(r", | and ", named)) == set(others.values())


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("page_kib", 0, "--page-kib: must be at least 1 and at most 1,048,576, found 0"),
        ("rank", 0, "--rank: must be at least 1 and at most 65,536, found 0"),
        ("patience", 3, "--patience: needs --eval-every and held-out data"),
    ],
)
def test_errors_name_a_setting_as_the_option_or_key_it_was_given_by(
    run_cli, instructions, tmp_path, option, value, said
):
    done = run_cli(
        "train", "--base", "x", "--data", instructions, "-o", tmp_path / "out", f"--{option}".replace("_", "-"), value
    )
    assert (done.code, done.stderr.splitlines()[0]) == (2, f"error: {said}")
    (tmp_path / "t.json").write_text(json.dumps({"base": "x", "data": [str(instructions)], option: value}))
    done = run_cli("train", "--config", tmp_path / "t.json", "-o", tmp_path / "out")
    written = said.replace("--held-out", "held_out").replace("--eval-every", "eval_every")
    written = written.replace(f"--{option}".replace("_", "-"), option)
    assert done.stderr.splitlines()[0] == f"error: {tmp_path / 't.json'}: {written}"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("plan {base} --rank 0", "--rank: must be at least 1 and at most 65,536, found 0"),
        ("quantize {base} -o out --max-shard-size=0", "--max-shard-size: must be at least 1, found 0"),
        ("quantize {base} -o out --block-size 33", "--block-size: must be a power of two from 32 to 4096, found 33"),
        ("stack {base} {base} -o out --method ties --lambda 0",
         "--lambda: must be other than 0, found 0.0"),
        ("verify {base} --recompute", "--recompute: needs the parents"),
        ("evaluate --base {base} --data x.jsonl --max-tokens 3", "--max-tokens: needs text"),
        ("merge {base} {base} -o out --no-undo --embed-adapter",
         "--embed-adapter: needs the undo record, as unmerge does, which --no-undo leaves out"),
        ("train --base {base} --data {rows} -o out --device cpu --shard-base",
         "--shard-base: needs several processes, found one"),
    ],
)  # fmt: skip
def test_errors_name_an_unusable_option_as_it_was_typed(run_cli, llama, instructions, tmp_path, typed, said):
    done = run_cli(*typed.format(base=llama, rows=instructions).split(), cwd=tmp_path)
    assert (done.code, done.stderr.splitlines()[0]) == (2, f"error: {said}")


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [
        ("decay", "0.5", "leave out --decay, or use --schedule wsd"),
        ("rank", "4", "leave out --rank, or --init"),
        ("micro_batch_size", "16", "set --batch-size to 16, or leave out --micro-batch-size"),
    ],
)
def test_hints_name_settings_as_options_unless_they_are_in_a_file(
    run_cli, llama, adapter, instructions, tmp_path, option, value, hint
):
    also = {"init": str(adapter)} if "--init" in hint else {}
    typed = {option: value} | also
    options = [text for name, given in typed.items() for text in (f"--{name.replace('_', '-')}", given)]
    done = run_cli("train", "--base", llama, "--data", instructions, "-o", "out", *options, cwd=tmp_path)
    assert (done.code, done.stderr.splitlines()[1]) == (2, f"hint: {hint}")
    written = {"base": str(llama), "data": [str(instructions)]} | typed | {option: json.loads(value)}
    (tmp_path / "t.json").write_text(json.dumps(written))
    done = run_cli("train", "--config", "t.json", "-o", "out", cwd=tmp_path)
    assert done.stderr.splitlines()[1] == f"hint: {re.sub('--([a-z-]+)', lambda f: f[1].replace('-', '_'), hint)}"


def test_a_path_named_like_an_option_is_not_renamed_in_errors(run_cli, llama, instructions, tmp_path):
    (tmp_path / "base").symlink_to(llama)
    for output, base, said in (
        ("base", "./base", "base: already exists"),
        ("o", "init", "init: does not exist; expected a checkpoint or adapter folder"),
        ("o", "max_length", "max_length: does not exist; expected a checkpoint or adapter folder"),
    ):
        done = run_cli("train", "--base", base, "--data", instructions, "-o", output, "--init", "init", cwd=tmp_path)
        assert done.stderr.startswith(f"error: {said}\n")


def test_a_settings_name_within_a_path_is_not_renamed_in_errors(run_cli, llama, instructions, tmp_path):
    data = tmp_path / "max_length" / "page_kib.jsonl"
    done = run_cli("train", "--base", llama, "--data", data, "-o", tmp_path / "out", "--mixture", "x=1")
    assert f"hint: name one of the data: {data}" in done.stderr


def test_a_missing_required_option_of_train_is_named(run_cli, instructions):
    done = run_cli("train", "--data", instructions, "-o", "out")
    assert done.stderr == "error: --base is missing\nhint: give --base, or a --config FILE with base\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--lr", "--learning-rate"), ("-r", "--rank")],
)
def test_an_option_of_another_trainer_gets_the_right_name_as_a_hint(
    run_cli, llama, instructions, tmp_path, typed, meant
):
    error, hint = run_cli(*train(llama, instructions, tmp_path / "out", typed, "1")).refusal(2)
    assert (error, hint) == (f"error: no such option: {typed}", f"hint: did you mean {meant}?")
    key = typed.lstrip("-").replace("-", "_")
    (tmp_path / "t.json").write_text(json.dumps({"base": str(llama), "data": [str(instructions)], key: 1}))
    error, hint = run_cli("train", "--config", tmp_path / "t.json", "-o", tmp_path / "out").refusal(2)
    assert error.endswith(f"{key}: unknown key")
    assert hint == f"hint: did you mean {meant.lstrip('-').replace('-', '_')!r}?"


def test_names_of_other_trainers_are_not_names_of_train_and_mean_options_of_it():
    options = {option.name for option in train_command.params}
    assert set(OTHER_NAMES.values()) <= options
    assert not options.intersection(OTHER_NAMES)


def test_plan_and_evaluate_have_the_names_and_values_of_train():
    """Names that only one of them has are of what the others do not do."""
    of_train, of_plan, of_evaluate = (
        {option.name: option for option in command.params if isinstance(option, click.Option)}
        for command in (train_command, plan_command, evaluate_command)
    )
    assert of_plan.keys() - of_train.keys() == {"moe"}
    assert of_plan.keys() & of_evaluate.keys() <= of_train.keys()
    assert {"max_length", "batch_size", "layout", "compute_dtype", "device"} <= of_train.keys() & of_evaluate.keys()
    for name in of_plan.keys() & of_train.keys():
        assert of_plan[name].opts == of_train[name].opts
        assert of_plan[name].multiple == of_train[name].multiple
    for name, choices in {"method": METHODS, "optimizer": OPTIMIZERS, "compute_dtype": COMPUTE_DTYPES}.items():
        for value in choices:
            assert getattr(PlanOptions(**{name: value}), name) == value
