"""The command line: help without torch, one-line errors, documented exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from folders import edit_json, tree

from adaptkit.cli.output import notes
from adaptkit.cli.progress import Bar
from adaptkit.settings import settings
from adaptkit.training.config import TrainConfig

COMMANDS = [
    "adopt", "check", "dequantize", "diff", "evaluate", "extract", "inspect", "merge", "plan", "publish", "pull",
    "quantize", "resize", "run", "stack", "train", "unmerge", "verify",
]  # fmt: skip


def test_the_help_of_every_command_imports_neither_torch_nor_the_hub():
    code = (
        "import sys\n"
        "from adaptkit.cli.main import main\n"
        "for command in sys.argv[1:]:\n"
        "    sys.argv = ['adaptkit', *command.split(), '--help']\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, command\n"
        "    heavy = {'torch', 'numba', 'huggingface_hub', 'transformers', 'rich'} & set(sys.modules)\n"
        "    assert not heavy, (command, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "", *COMMANDS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("Usage")] == [
        "[OPTIONS]",
        *COMMANDS,
    ]


@pytest.mark.quick
def test_the_group_lists_every_command_with_a_complete_sentence(run_cli):
    lines = run_cli("--help").stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == sorted(COMMANDS)
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []


def test_the_help_of_train_has_every_setting_once_under_a_heading(run_cli):
    parts = re.split(r"^(\S[^\n]*):\n", run_cli("train", "--help").stdout, flags=re.MULTILINE)
    sections = zip(parts[1::2], parts[2::2], strict=True)
    options = {title: re.findall(r"^  --([\w-]+)", part, re.MULTILINE) for title, part in sections}
    assert options.pop("Options") == ["force", "json", "quiet", "config", "resume", "dry-run", "show-batch"]
    shown = [name for name, (_, rule) in settings(TrainConfig).items() if not rule.hidden]
    assert [name.replace("-", "_") for listed in options.values() for name in listed] == shown
    assert {title: listed[0] for title, listed in options.items()} == {
        "Model and data": "base", "Adapter": "rank", "Samples": "layout", "Steps": "steps",
        "Evaluation and checkpoints": "eval-every", "Optimizer": "learning-rate", "Answers and trackers":
        "sample-prompts", "Memory and device": "optimizer",
    }  # fmt: skip


NAMED = ("--chat-template-kwargs", "--mixture", "--rank-pattern", "--alpha-pattern")
"""Repeatable options that take a name and a value."""


def broken(tmp_path, llama, llama_nf4, adapter):
    """Command lines that must fail: arguments, exit code, a phrase of the message."""
    return {
        "missing folder": (["quantize", tmp_path / "absent", "-o", "out"], 2, "does not exist"),
        "a file": (["quantize", tmp_path / "file", "-o", "out"], 2, "is a file"),
        "not a checkpoint": (["quantize", tmp_path / "empty", "-o", "out"], 5, "not a checkpoint"),
        "no name": (["quantize", llama, "-o", "."], 2, "is not a name for a new folder"),
        "no name to be": (["quantize", llama, "-o", "absent/.."], 2, "is not a name for a new folder"),
        "inside its input": (["quantize", tmp_path / "small", "-o", tmp_path / "small" / "out"], 2, "its own input"),
        "name too long": (["quantize", "a" * 300, "-o", "out"], 2, "does not exist"),
        "name of a part": (["quantize", tmp_path / "stray", "-o", "out"], 5, "the name of a part of"),
        "bad block size": (["quantize", llama, "-o", "out", "--block-size", "48"], 2, "power of two"),
        "no unit": (["quantize", llama, "-o", "out", "--max-shard-size", "5"], 2, "'5' has no unit; write 5GB or"),
        "bad shard size": (["quantize", llama, "-o", "out", "--max-shard-size", "big"], 2, "not a size"),
        "unknown option": (["quantize", llama, "-o", "out", "--fast"], 2, "No such option"),
        "quantized": (["quantize", llama_nf4, "-o", "out"], 5, "already quantized with bitsandbytes"),
        "no experts": (["quantize", llama, "-o", "out", "--moe", "quantize"], 2, "no experts found to quantize"),
        "no adapter": (["merge", llama, llama, "-o", "out"], 5, "not an adapter"),
        "weights": (["merge", llama, adapter, "-o", "out", "--weight", "1", "--weight", "2"], 2, "2 weights for 1"),
        "infinite weight": (["merge", llama, adapter, "-o", "out", "--weight", "inf"], 2, "is inf; expected a number"),
        "another model": (["merge", tmp_path / "small", adapter, "-o", "out"], 4, "the adapter expects shape"),
        "huge weight": (["stack", adapter, adapter, "-o", "out", "--weight", "1e308", "--weight", "1"], 5, "too large"),
        "one to stack": (["stack", adapter, "-o", "out"], 2, "at least two"),
        "no such method": (["stack", adapter, adapter, "-o", "out", "--method", "magic"], 2, "must be one of breadcr"),
        "plain base": (["train", "--base", llama, "--data", "x", "-o", "out", "--method", "qlora"], 2, "not quantized"),
        "no base": (["train", "--data", "x.jsonl", "-o", "out"], 2, "base is missing"),
        "unknown key": (["train", "--config", tmp_path / "bad.yaml", "-o", "out"], 2, "line 3: lerning_rate: unknown"),
        "equal keys": (["train", "--config", tmp_path / "twice.yaml", "-o", "out"], 2, "'rank' appears twice"),
        "huge seed": (["evaluate", "--base", llama, "--prompt", "x", "--seed", "9" * 20], 2, "2^63 - 1, found 9999"),
        "long row": (["plan", tmp_path / "bert", "--max-length", "1024"], 2, "its forward pass cannot be simulated"),
        **{
            f"{flag} twice": (
                ["train", "--base", llama, "--data", "x", "-o", "out", flag, "a=1", flag, "a=2"],
                2,
                f"'{flag}': 'a' is given twice",
            )
            for flag in NAMED
        },
        "equal variables": (["evaluate", "--base", llama, *(NAMED[0], "a=1") * 2], 2, "'a' is given twice"),
        "no batch": (["evaluate", "--base", llama, "--prompt", "x", "--batch-size", "0"], 2, "batch-size"),
        "no command": ([], 2, "Missing command"),
        "nothing to measure": (["evaluate", "--base", llama], 2, "nothing to evaluate"),
        "nothing to publish": (["publish", "", "org/name"], 2, "the path is empty"),
        "nowhere to publish": (["publish", llama, ""], 2, "'': not the name of a repository"),
        "no work folder": (["run", "recipe.yaml", "--work", ""], 2, "'--work': the path is empty"),
        "unpublishable": (["publish", llama, "org/name"], 3, "adaptkit-manifest.json not found"),
    }


@pytest.fixture(scope="module")
def trouble(tmp_path_factory, llama, llama_nf4, adapter):
    import tiny
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("trouble")
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    tiny.write_llama(folder / "small", hidden=32)
    tiny.write_llama(folder / "stray")
    weights = folder / "stray" / "model.safetensors"
    tensors = load_file(weights) | {"model.layers.1.mlp.up_proj.weight.absmax": torch.zeros(3)}
    save_file(tensors, weights, metadata={"format": "pt"})
    (folder / "bert").mkdir()
    bert = {"model_type": "bert", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    (folder / "bert" / "config.json").write_text(json.dumps(bert | {"vocab_size": 99}))
    (folder / "twice.yaml").write_text("base: x\ndata: [y]\nrank: 4\nrank: 8\n")
    (folder / "bad.yaml").write_text("base: x\ndata: [y]\nlerning_rate: 1.0e-4\n")
    return broken(folder, llama, llama_nf4, adapter)


@pytest.mark.quick
def test_bad_input_prints_only_an_error_and_a_hint_and_exits_with_its_code(trouble, run_cli, tmp_path):
    for case, (arguments, code, phrase) in trouble.items():
        error, _ = run_cli(*arguments, cwd=tmp_path).refusal(code)
        assert phrase in error, case
        assert not (tmp_path / "out").exists(), case


def test_a_line_break_in_a_path_does_not_break_the_line_of_an_error(run_cli, llama, tmp_path):
    folder = tmp_path / "one\ntwo"
    folder.mkdir()
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "absent.safetensors"}}')
    said = run_cli("inspect", folder).stderr.splitlines()
    assert [line.partition(":")[0] for line in said] == ["error", "hint"]
    assert said[0].endswith("one two/absent.safetensors: No such file or directory")


@pytest.mark.parametrize("key", ["base", "data"])
def test_an_unexpanded_tilde_in_a_file_gets_a_hint(key, run_cli, llama, instructions, tmp_path):
    values = {"base": str(llama), "data": [str(instructions)]} | {key: ["~/it.jsonl"] if key == "data" else "~/it"}
    (tmp_path / "train.json").write_text(json.dumps(values))
    said = run_cli("train", "--config", "train.json", "-o", "out", cwd=tmp_path).stderr
    assert said.splitlines()[1] == "hint: write the full path: only a shell expands ~"


@pytest.mark.quick
def test_with_json_a_failure_prints_one_document(run_cli, tmp_path):
    done = run_cli("verify", tmp_path / "absent", "--json")
    assert done.code == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "usage"
    assert error["retryable"] is False
    assert "does not exist" in error["message"]
    assert set(error) == {"code", "message", "hint", "retryable"}
    assert done.stderr == ""


def test_with_json_only_the_first_of_several_processes_prints_the_document(run_cli, tmp_path):
    asked = "train", "--base", "b", "--data", "d", "--rank", 0, "-o", tmp_path / "out", "--json"
    ends = [run_cli(*asked, MASTER_ADDR="127.0.0.1", RANK=rank) for rank in ("0", "1")]
    assert [done.code for done in ends] == [2, 2]
    assert "--rank: must be at least 1 and at most 65,536, found 0" in json.loads(ends[0].stdout)["error"]["message"]
    assert ends[1].stdout == ""
    assert ends[1].stderr.startswith("process 1: error: ")
    alone = run_cli("verify", tmp_path / "absent", "--json", MASTER_ADDR="127.0.0.1", RANK="1")
    assert "does not exist" in json.loads(alone.stdout)["error"]["message"]  # verify never runs in several processes


def test_with_json_a_success_prints_one_document_and_quiet_prints_nothing(run_cli, llama, instructions, tmp_path):
    done = run_cli("quantize", llama, "-o", tmp_path / "one", "--json")
    assert json.loads(done.stdout)["quantized"] == 14
    assert done.stderr == ""
    assert run_cli("quantize", llama, "-o", tmp_path / "two", "--quiet").stdout == ""
    seen = ("train", "--base", llama, "--data", instructions, "-o", tmp_path / "x", "--show-batch")
    for command in (seen, ("inspect", tmp_path / "two", "--mermaid")):
        assert run_cli(*command, "--quiet").stdout == ""
    assert (tmp_path / "two" / "config.json").is_file()
    both = run_cli(*seen, "--dry-run")
    assert (both.code, both.stdout, "choose one" in both.stderr) == (2, "", True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("folder", "options", "code", "sink"),
    [("absent", ["--json"], 2, "/dev/full"), ("absent", ["--json"], 2, "/dev/null"), ("", [], 1, "/dev/full")],
)
def test_if_stdout_cannot_be_written_the_error_is_on_stderr(llama, folder, options, code, sink):
    """An error document that goes to /dev/null would be lost, too; a report there is meant to be."""
    with Path(sink).open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "adaptkit.cli.main", "inspect", llama / folder, *options],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    said = {
        ("absent", sink): [
            f"error: {llama / folder}: does not exist; expected a checkpoint or adapter folder",
            "hint: check the path",
        ],
        ("", "/dev/full"): ["error: stdout: cannot be written: No space left on device"],
    }
    lines = said.get((folder, sink), [])
    assert (done.returncode, done.stderr.splitlines()) == (code if lines else 0, lines)


@pytest.mark.parametrize("streams", ["1>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams_are_tolerated(run_cli, llama, llama_nf4, tmp_path, streams):
    """quantize starts a process, which takes seconds, so it runs only without any of them."""
    of, command = (llama_nf4, "dequantize") if len(streams) < 6 else (llama, "quantize")
    words = [sys.executable, "-m", "adaptkit.cli.main", command, of, "-o", tmp_path / "out"]
    done = subprocess.run(["sh", "-c", f'exec "$@" {streams}', "sh", *words], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert run_cli(command, of, "-o", tmp_path / "expected").code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


@pytest.mark.quick
def test_a_dry_run_writes_nothing(run_cli, llama, adapter, tmp_path):
    for arguments in (["quantize", llama], ["merge", llama, adapter]):
        done = run_cli(*arguments, "-o", tmp_path / "out", "--dry-run")
        assert done.code == 0
        assert "would write" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_what_adaptkit_made(run_cli, llama, tmp_path):
    first = run_cli("quantize", llama, "-o", tmp_path / "out", "--block-size", "128")
    again = run_cli("quantize", llama, "-o", tmp_path / "out", "--force")
    assert first.code == again.code == 0
    assert first.stdout != again.stdout
    assert run_cli("verify", tmp_path / "out").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_does_not_replace_an_input(run_cli, llama, tmp_path):
    run_cli("quantize", llama, "-o", tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    done = run_cli("dequantize", tmp_path / "base", "-o", tmp_path / "base", "--force")
    assert done.code == 2
    assert "its own input" in done.stderr
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_right_after_its_handler_is_installed_ends_the_program_cleanly(number, code, tmp_path):
    program = f"""
import os, signal, sys
from adaptkit.cli.main import main

real = signal.signal
def at_once(which, handler):
    before = real(which, handler)
    if which == signal.{number} and getattr(handler, "__name__", "") == "_stop":
        os.kill(os.getpid(), which)
    return before

signal.signal, sys.argv = at_once, ["adaptkit", "quantize", "absent", "-o", "out"]
main()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    word = {"SIGINT": "interrupted", "SIGTERM": "terminated"}[number]
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"error: {word}\nhint: run the same command again to resume\n"


def test_interrupted_commands_that_cannot_resume_get_no_hint_to_resume(tmp_path):
    program = """
import os, signal, sys
from adaptkit.cli import main as program

program.cli.main = lambda **_: os.kill(os.getpid(), signal.SIGINT)
program.main()
"""
    for word, hint in (("evaluate", ""), ("merge", "hint: run the same command again to resume\n")):
        command = [sys.executable, "-c", program, word, "absent"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (130, f"error: interrupted\n{hint}")


def test_undecodable_file_names_are_printed_escaped(llama, run_cli, tmp_path):
    name = os.fsdecode(b"out\xff")
    done = run_cli("quantize", llama, "-o", tmp_path / name, PYTHONIOENCODING="utf-8")
    assert (done.code, done.stderr) == (0, "")
    assert f"{tmp_path}/out\\udcff" in done.stdout
    assert (tmp_path / name).is_dir()
    done = run_cli("inspect", tmp_path / name, PYTHONIOENCODING="ascii")
    assert (done.code, done.stderr) == (0, "")


HOSTILE = "a\x1b]0;title\x07\r\x9b2J\u202eb"
"""A name that sets a terminal's title, overwrites its line, clears the screen and turns the text's direction round."""
ESCAPED = "a\\x1b]0;title\\x07\\r\\x9b2J\\u202eb"


def test_names_in_files_cannot_send_commands_to_the_terminal(adapter, copy_of, run_cli, tmp_path):
    lora = copy_of(adapter)
    edit_json(lora / "adapter_config.json", base_model_name_or_path=HOSTILE)
    assert f"base model name or path  {ESCAPED}\n" in run_cli("inspect", lora).stdout
    assert run_cli("adopt", lora, "-o", "ours", cwd=tmp_path).code == 0
    (tmp_path / "ours" / HOSTILE).write_text("")
    refused = run_cli("verify", "ours", cwd=tmp_path)
    assert refused.code == 3
    assert ESCAPED.replace("\\r", " ") + " is not in the manifest\n" in refused.stderr
    for done in (refused, run_cli("inspect", lora, "--json")):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.stdout + done.stderr)


def test_notes_and_progress_lines_are_escaped(capsys):
    notes(quiet=False)(HOSTILE)
    Bar("", hidden=True, columns=()).note(HOSTILE)
    assert capsys.readouterr().err == f"note: {ESCAPED}\n{ESCAPED}\n"
