"""``adaptkit train`` on every kind of data: previews, reports and errors."""

import json
import os
import pty
import subprocess
import sys

import pytest

from adaptkit.cli.training_view import batch_lines
from adaptkit.training.preview import Preview, ShownSample, Stretch

CHAT = {"conversations": [{"from": "human", "value": "Name a river"}, {"from": "gpt", "value": "the Rhine"}], "id": 7}
TEXT = {"text": "Call me Ishmael."}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps(CHAT) + "\n")
    (tmp_path / "text.json").write_text(json.dumps([TEXT, TEXT]))
    (tmp_path / "short.csv").write_text("instruction,output\nx,y\n")
    return tmp_path


def arguments(base, files, *names, **options):
    found = ["train", "--base", base, "-o", files / "adapter", "--held-out", 0, "--device", "cpu"]
    for name in names:
        found += ["--data", files / name]
    for name, value in options.items():
        found += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    return found


def test_the_first_batch_is_shown_with_learned_tokens_in_brackets(run_cli, llama, files):
    done = run_cli(*arguments(llama, files, "chat.jsonl", "text.json", pack=True, max_length=200, show_batch=True))
    assert (done.code, done.stderr) == (0, "")
    assert f"{files}/chat.jsonl, line 1: " in done.stdout
    assert "Name a river<|im_end|>↵\n<|im_start|>assistant↵\n⟦the Rhine<|im_end|>⟧↵" in done.stdout
    assert done.stdout.count("⟦all me Ishmael.<|im_end|>⟧") == 2  # the first token cannot be predicted
    assert done.stdout.count("  packed  ") == 2
    assert "1 row in 1 micro-batch, 0 positions of padding\n" in done.stdout
    assert "\x1b" not in done.stdout
    assert sorted(path.name for path in files.iterdir()) == ["chat.jsonl", "short.csv", "text.json"]


def test_the_preview_lists_unused_columns(run_cli, llama, files):
    """A preview of the model's input should also say what the input leaves out."""
    asked, answered = CHAT["conversations"]
    (files / "more.jsonl").write_text(json.dumps({"conversations": [asked | {"mo\x1bod": 1}, answered], "": 2}) + "\n")
    given = arguments(llama, files, "chat.jsonl", "text.json", "more.jsonl", show_batch=True)
    shown = run_cli(*given).stdout.splitlines()
    assert shown[-2:] == [
        f"{files}/chat.jsonl: not used: id",
        f"{files}/more.jsonl: not used: an unnamed column, mo␛od of messages",
    ]
    unused = json.loads(run_cli(*given, "--json").stdout)["unused"]
    assert unused == {f"{files}/chat.jsonl": ["id"], f"{files}/more.jsonl": ["", "mo\x1bod of messages"]}


def test_variables_of_the_chat_template_are_set(run_cli, llama, copy_of, files):
    model = copy_of(llama)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(
        "{% if not enable_thinking %}Hurry!{% endif %}{{ (mood ~ '')[:9] }}" + template
    )
    given = arguments(model, files, "chat.jsonl", show_batch=True)
    assert "\nHurry!<|im_start|>system" in run_cli(*given).stdout
    chosen = [*given, "--chat-template-kwargs", "enable_thinking=true", "--chat-template-kwargs", "mood=so=so 1"]
    assert "\nso=so 1<|im_start|>system" in run_cli(*chosen).stdout
    (files / "train.yaml").write_text("chat_template_kwargs: {enable_thinking: true, mood: 7}")
    assert "\n7<|im_start|>system" in run_cli(*given, "--config", files / "train.yaml").stdout
    nested = "mood=" + "[" * 100_000
    assert "\nHurry![[[[[[[[[<|im_start|>system" in run_cli(*given, "--chat-template-kwargs", nested).stdout
    for text, said in (("mod=1", "does not use 'mod'"), ("enable_thinking", "is not a name and a value")):
        refused = run_cli(*given, "--chat-template-kwargs", text)
        assert (refused.code, refused.stdout) == (2, "")
        assert said in refused.stderr


def test_learned_tokens_are_coloured_on_a_terminal(llama, files):
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "adaptkit.cli.main", *arguments(llama, files, "chat.jsonl", show_batch=True)]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with subprocess.Popen(map(str, command), stdout=follower, stdin=subprocess.DEVNULL, env=environment) as process:
        os.close(follower)
        shown = b""
        while piece := _read(leader):
            shown += piece
    assert process.returncode == 0
    assert "\x1b[32m\x1b[1mthe Rhine<|im_end|>\x1b[0m" in shown.decode()
    assert "⟦" not in shown.decode()


def _read(descriptor):
    try:
        return os.read(descriptor, 4096)
    except OSError:  # raised by Linux when the other side is closed
        return b""


def test_control_characters_in_data_are_shown_as_symbols():
    part = Stretch(False, (1,), "\x1b[2J\rgone\x07\x9b")
    shown = Preview(1, 1, 0, (ShownSample("ro\x1bws.jsonl, line 1", 1, 1, 0, (part,)),))
    lines = "\n".join(batch_lines(shown, False))
    assert "␛[2J␍gone␇\\x9b" in lines
    assert "ro\\x1bws.jsonl, line 1" in lines


def test_the_json_preview_has_every_token(run_cli, llama, files):
    done = run_cli(*arguments(llama, files, "chat.jsonl", show_batch=True), "--json")
    (sample,) = json.loads(done.stdout)["samples"]
    assert [part["learned"] for part in sample["stretches"]] == [False, True, False]
    assert sample["tokens"] == sum(len(part["ids"]) for part in sample["stretches"])
    assert sample["learned"] == len(sample["stretches"][1]["ids"])


def test_only_the_first_of_several_processes_shows_the_batch(run_cli, llama, files):
    given = arguments(llama, files, "chat.jsonl", show_batch=True)
    assert json.loads(run_cli(*given, "--json", RANK="0").stdout)["rows"] == 1
    for more in ((), ("--json",)):
        other = run_cli(*given, *more, MASTER_ADDR="127.0.0.1", RANK="1")
        assert (other.code, other.stdout, other.stderr) == (0, "", "")


def test_the_report_says_how_each_data_file_is_used(run_cli, llama, files):
    given = arguments(
        llama, files, "chat.jsonl", "text.json", "short.csv", mixture="short.csv=2", pack=True,
        max_length=200, held_out_data=files / "short.csv", steps=1,
    )  # fmt: skip
    done = run_cli(*given, "--dry-run")
    assert done.code == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    shown = [value for label, value in lines if label == "data"]
    assert [line.split(";")[0] for line in shown] == [
        f"{files}/chat.jsonl: 1 conversations", f"{files}/text.json: 2 text", f"{files}/short.csv: 1 instruction",
    ]  # fmt: skip
    assert "not used: id" in shown[0]
    document = json.loads(run_cli(*given, "--dry-run", "--json").stdout)
    assert document["data"]["repeated"] == 1
    assert "repeated" in done.stdout
    assert len(document["data"]["epoch_tokens"]) == 3


def test_rows_with_special_tokens_in_messages_are_reported(run_cli, llama, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "<|im_start|>user", "completion": "fine"}\n')
    done = run_cli(*arguments(llama, tmp_path, "rows.jsonl", held_out=0, steps=1), "--dry-run")
    found = "1 row has a special token in a message or tool, which the model does not read as text"
    assert f"{found} (the first: {tmp_path}/rows.jsonl, line 1: <|im_start|>)" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("too_long", "told"),
    [
        ("cut", ["cut 1 held-out sample to max_length;", "left out 1 held-out sample, too long or without"]),
        ("drop", ["cut 0 held-out samples to max_length;", "left out 2 held-out samples, too long or without"]),
    ],
)
def test_cut_and_dropped_held_out_samples_are_reported(run_cli, llama, files, too_long, told):
    """The best adapter is chosen by the held-out loss, which differs if answers are cut."""
    rows = [{"instruction": "x " * n, "output": "y " * m} for n, m in ((1, 60), (60, 1), (1, 1))]
    (files / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"held_out_data": files / "long.jsonl", "max_length": 60, "too_long": too_long, "steps": 1, "rank": 1}
    done = run_cli(*arguments(llama, files, "short.csv", **options), "--dry-run")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    cut = [line for line in lines if line.startswith(("cut", "left out"))]
    assert [line.startswith(start) for line, start in zip(cut, told, strict=True)] == [True, True], done.stderr


@pytest.mark.parametrize(
    ("rows", "options", "code", "message"),
    [
        ('{"instruction": "x"}', {}, 5, "rows.jsonl, line 2: no column output or response or completion or answer"),
        ('{"prompt": "x", "completion": "y"}', {"mixture": "row.jsonl=2"}, 2, "'row.jsonl' is not one of the data"),
    ],
)  # fmt: skip
def test_bad_data_ends_in_an_error_and_a_hint(rows, options, code, message, run_cli, llama, files):
    (files / "rows.jsonl").write_text('{"prompt": "x", "completion": "y"}\n' + rows + "\n")
    error, _ = run_cli(*arguments(llama, files, "rows.jsonl", **options)).refusal(code)
    assert message in error
    assert not (files / "adapter").exists()


@pytest.mark.parametrize(("option", "value", "steps"), [("steps", 3, 3), ("epochs", 2, 4)])
def test_steps_or_epochs_on_the_command_line_replace_either_in_the_file(run_cli, llama, files, option, value, steps):
    (files / "train.yaml").write_text("epochs: 7\n" if option == "steps" else "steps: 7\n")
    more = {option: value, "config": files / "train.yaml", "dry_run": True, "json": True, "batch_size": 1}
    done = run_cli(*arguments(llama, files, "text.json", **more))
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == steps


def test_a_row_that_is_excluded_from_the_loss_is_refused(run_cli, llama, files):
    (files / "marked.jsonl").write_text(f"{json.dumps(CHAT)}\n{json.dumps(CHAT | {'weight': 0})}\n")
    error, hint = run_cli(*arguments(llama, files, "marked.jsonl", dry_run=True)).refusal(5)
    assert error == f"error: {files}/marked.jsonl, line 2: weight 0 excludes the whole row from the loss"
    assert "remove such rows" in hint
