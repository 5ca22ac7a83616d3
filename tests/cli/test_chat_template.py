"""``--chat-template``: the given template is used in training and saved with the adapter and all that it becomes."""

import json
import re
import shutil

import pytest
from folders import edit_json
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from adaptkit.training.config import TrainConfig
from adaptkit.training.inputs import read_inputs

TEMPLATE = """{% for message in messages %}[{{ message.role }}] {{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""
ROWS = [
    {"messages": [{"role": "user", "content": f"Name river {i}"}, {"role": "assistant", "content": f"the Rhine {i}"}]}
    for i in range(4)
]


@pytest.fixture
def untemplated(llama, copy_of):
    folder = copy_of(llama, "base")
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    return path


def train(base, rows, name, *more):
    return ["train", "--base", base, "--data", rows, "-o", rows.parent / name, "--steps", 1, "--held-out", 0,
            "--device", "cpu", *more]  # fmt: skip


def test_samples_with_a_given_template_equal_those_of_transformers(run_cli, untemplated, rows):
    given = train(untemplated, rows, "a", "--chat-template", rows.parent / "mine.jinja", "--show-batch", "--json")
    (shown, *_) = json.loads(run_cli(*given).stdout)["samples"]
    tokenizer = AutoTokenizer.from_pretrained(untemplated)
    number = int(shown["source"].rpartition(" ")[2]) - 1
    text = tokenizer.apply_chat_template(ROWS[number]["messages"], chat_template=TEMPLATE, tokenize=False)
    found = [token for stretch in shown["stretches"] for token in stretch["ids"]]
    assert tokenizer.decode(found) == text
    learned = tokenizer.decode([t for s in shown["stretches"] if s["learned"] for t in s["ids"]])
    assert learned.strip() == ROWS[number]["messages"][1]["content"] + "<|im_end|>"


def test_a_given_template_is_saved_with_the_adapter_and_used_by_later_commands(run_cli, untemplated, rows, tmp_path):
    mine = tmp_path / "mine.jinja"
    done = run_cli(*train(untemplated, rows, "a", "--chat-template", mine))
    assert done.code == 0, done.stderr
    assert f"from {mine}; it is saved with the output" in done.stdout
    assert (tmp_path / "a/chat_template.jinja").read_text() == TEMPLATE
    assert run_cli("verify", tmp_path / "a").code == 0

    measured = ["evaluate", "--data", rows, "--device", "cpu", "--json"]
    alone = json.loads(run_cli(*measured, "--base", untemplated, "--adapter", tmp_path / "a").stdout)
    assert alone["own_template"]
    table = json.loads(run_cli(*measured, "--base", untemplated, "--adapter", tmp_path / "a", "--compare").stdout)
    assert [model["own_template"] for model in table["models"]] == [False, True]
    assert table["models"][1]["loss"] == alone["loss"]

    merged = run_cli("merge", untemplated, tmp_path / "a", "-o", tmp_path / "m")
    assert "chat template: taken from the adapter" in merged.stdout
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == TEMPLATE
    assert json.loads(run_cli(*measured, "--base", tmp_path / "m").stdout)["loss"] == pytest.approx(
        alone["loss"], abs=0.05
    )

    again = run_cli(*train(untemplated, rows, "b", "--init", tmp_path / "a"))
    assert f"from {tmp_path / 'a'}; it is saved with" in again.stdout
    assert (tmp_path / "b/chat_template.jinja").read_text() == TEMPLATE


def test_a_template_equal_to_the_bases_is_not_saved_again(run_cli, llama, rows):
    done = run_cli(*train(llama, rows, "a", "--chat-template", llama / "chat_template.jinja"))
    assert done.code == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("template")] == []
    assert not (rows.parent / "a/chat_template.jinja").exists()


def test_full_training_saves_the_given_template_instead_of_the_bases(run_cli, untemplated, rows):
    (untemplated / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    given = train(untemplated, rows, "full", "--method", "full", "--chat-template", rows.parent / "mine.jinja")
    done = run_cli(*given)
    assert done.code == 0, done.stderr
    assert not (rows.parent / "full/chat_template.json").exists()
    assert AutoTokenizer.from_pretrained(rows.parent / "full").chat_template == TEMPLATE
    assert run_cli("verify", rows.parent / "full").code == 0


def test_a_different_template_changes_the_identity_of_a_run(untemplated, rows, tmp_path):
    """Even if the samples are the same, since the template is saved with the result."""
    other, same = tmp_path / "other.jinja", tmp_path / "same.jinja"
    other.write_text(TEMPLATE + "{# the same samples #}")
    same.write_text(TEMPLATE)
    found = [
        read_inputs(
            TrainConfig(str(untemplated), (str(rows),), chat_template=str(path), device="cpu"), None, False
        ).identity()
        for path in (tmp_path / "mine.jinja", same, other)
    ]
    assert found[0] == found[1]
    assert [name for name in found[0] if found[0][name] != found[2][name]] == ["chat_template"]


def templates_of(folder):
    return AutoTokenizer.from_pretrained(folder).chat_template


def test_a_tool_template_is_kept_with_its_default_template_and_dropped_with_it(run_cli, llama, rows, tmp_path):
    named = AutoTokenizer.from_pretrained(llama)
    named.chat_template = {
        "default": named.chat_template,
        "tool_use": "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}",
    }
    named.save_pretrained(tmp_path / "named")
    call = {"role": "assistant", "tool_calls": [{"name": "depth", "arguments": {"of": "Rhine"}}]}
    calling = {"tools": [{"name": "depth"}], "messages": [ROWS[0]["messages"][0], call]}
    rows.write_text(json.dumps(calling) + "\n")
    assert run_cli(*train(llama, rows, "refused")).code == 5, "the base's own knows of no tools"
    (tmp_path / "plain.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert run_cli(*train(llama, tmp_path / "plain.jsonl", "a")).code == 0
    for path in (tmp_path / "named").rglob("*.*"):  # as other trainers save them with an adapter
        target = tmp_path / "a" / path.relative_to(tmp_path / "named")
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    (tmp_path / "a/adaptkit-manifest.json").unlink()

    measured = ["evaluate", "--data", rows, "--device", "cpu", "--base", llama, "--adapter"]
    assert run_cli(*measured, tmp_path / "a").code == 0
    done = run_cli(*train(llama, rows, "b", "--init", tmp_path / "a"))
    assert done.code == 0, done.stderr
    assert templates_of(tmp_path / "b") == named.chat_template
    assert run_cli("merge", llama, tmp_path / "b", "-o", tmp_path / "merged").code == 0
    assert templates_of(tmp_path / "merged") == named.chat_template

    rows.write_text(json.dumps(ROWS[0]) + "\n")
    mine, base = ("--chat-template", tmp_path / "mine.jinja"), tmp_path / "merged"
    for name, more in (("c", ()), ("d", ("--init", tmp_path / "a")), ("full", ("--method", "full"))):
        done = run_cli(*train(base, rows, name, *mine, *more))
        assert done.code == 0, done.stderr
    assert run_cli("merge", base, tmp_path / "c", "-o", tmp_path / "e").code == 0
    assert [templates_of(tmp_path / name) for name in ("d", "full", "e")] == [TEMPLATE] * 3


def test_the_report_notes_a_missing_template_and_end_tokens_that_do_not_stop_generation(
    run_cli, untemplated, rows, tmp_path
):
    plain = run_cli(*train(untemplated, rows, "a", "--dry-run")).stdout
    assert "none: messages are joined as plain lines" in plain
    assert "end token" not in plain
    (untemplated / "generation_config.json").write_text('{"eos_token_id": [0]}')
    told = run_cli(*train(untemplated, rows, "a", "--dry-run", "--chat-template", tmp_path / "mine.jinja")).stdout
    assert "answers end with <|im_end|>, which the base's generation_config.json does not name" in told
    assert "the model has none" not in told
    (untemplated / "generation_config.json").unlink()  # then config.json is used, as in transformers
    config = json.loads((untemplated / "config.json").read_text())
    end = AutoTokenizer.from_pretrained(untemplated).convert_tokens_to_ids("<|im_end|>")
    for named, is_told in ((end, False), ([0, end], False), (0, True), (None, True)):
        (untemplated / "config.json").write_text(json.dumps(config | {"eos_token_id": named}))
        said = run_cli(*train(untemplated, rows, "a", "--dry-run", "--chat-template", tmp_path / "mine.jinja")).stdout
        assert ("end token" in said) == is_told


def test_a_template_in_the_folder_to_be_replaced_is_not_lost(run_cli, untemplated, rows, tmp_path):
    assert run_cli(*train(untemplated, rows, "a", "--chat-template", tmp_path / "mine.jinja")).code == 0
    mine = tmp_path / "a/chat_template.jinja"
    done = run_cli(*train(untemplated, rows, "a", "--chat-template", mine, "--force"))
    assert (done.code, done.stdout) == (2, "")
    assert mine.read_text() == TEMPLATE


def test_a_byte_order_mark_of_the_template_does_not_reach_the_samples(run_cli, untemplated, rows, tmp_path):
    marked = tmp_path / "marked.jinja"
    marked.write_bytes(b"\xef\xbb\xbf" + TEMPLATE.encode())
    shown = [
        run_cli(*train(untemplated, rows, "a", "--show-batch", "--chat-template", path)).stdout
        for path in (marked, tmp_path / "mine.jinja")
    ]
    assert shown[0] == shown[1] != ""


@pytest.fixture
def trained(run_cli, untemplated, rows, tmp_path):
    """An adapter without a template of its own."""
    assert run_cli(*train(untemplated, rows, "plain")).code == 0
    return tmp_path / "plain"


@pytest.mark.parametrize(
    "kept",
    [TEMPLATE, [{"name": "rag", "template": "x"}, {"name": "default", "template": TEMPLATE}]],
    ids=["one", "named"],
)
def test_a_template_in_the_adapters_tokenizer_config_is_used_by_all_commands(
    run_cli, untemplated, rows, trained, tmp_path, kept
):
    (trained / "tokenizer_config.json").write_text(json.dumps({"chat_template": kept}))
    measured = ["evaluate", "--data", rows, "--device", "cpu", "--json", "--base", untemplated, "--adapter", trained]
    assert json.loads(run_cli(*measured).stdout)["own_template"]
    again = run_cli(*train(untemplated, rows, "b", "--init", trained))
    assert (tmp_path / "b/chat_template.jinja").read_text() == TEMPLATE, again.stderr
    assert run_cli("merge", untemplated, trained, "-o", tmp_path / "m").code == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == TEMPLATE


def test_merge_copies_an_invalid_template_unchanged_and_evaluate_refuses_it(
    run_cli, untemplated, rows, trained, tmp_path
):
    (trained / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{% broken")
    asked = run_cli("evaluate", "--base", untemplated, "--adapter", trained, "--data", rows, "--device", "cpu")
    assert (asked.code, "invalid chat template (line 1: " in asked.stderr) == (5, True)
    assert run_cli("merge", untemplated, trained, "-o", tmp_path / "m").code == 0
    assert (tmp_path / "m/chat_template.jinja").read_bytes() == b"\xef\xbb\xbf{% broken"


def test_the_adapters_tokenizer_takes_precedence_over_the_bases(run_cli, untemplated, rows, trained, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(untemplated)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[user]"]})  # one token, where the base's has several
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(trained)
    for command in (
        train(untemplated, rows, "b", "--init", trained, "--dry-run"),
        ["evaluate", "--base", untemplated, "--adapter", trained, "--data", rows, "--device", "cpu"],
    ):
        done = run_cli(*command)
        assert done.code != 0
        assert str(len(tokenizer) - 1) in done.stderr


def test_extract_copies_the_template_and_the_end_token(run_cli, untemplated, rows, tmp_path):
    (untemplated / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert run_cli(*train(untemplated, rows, "a", "--chat-template", tmp_path / "mine.jinja")).code == 0
    assert run_cli("merge", untemplated, tmp_path / "a", "-o", tmp_path / "m").code == 0
    done = run_cli("extract", tmp_path / "m", untemplated, "-o", tmp_path / "x", "--rank", 2)
    assert re.search("also copied .*chat_template.jinja.*, generation_config.json", done.stdout)
    made, found = (tmp_path / name / "generation_config.json" for name in ("a", "x"))
    assert made.read_bytes() == found.read_bytes()
    assert run_cli("merge", untemplated, tmp_path / "x", "-o", tmp_path / "again").code == 0
    assert (tmp_path / "again/generation_config.json").read_bytes() == made.read_bytes()


def test_all_compared_models_get_the_same_questions(run_cli, untemplated, rows, tmp_path):
    """Even if the template of one of them leaves less room for questions."""
    long = tmp_path / "long.jinja"
    long.write_text("[" * 60 + TEMPLATE)
    assert run_cli(*train(untemplated, rows, "a", "--chat-template", long)).code == 0
    config = json.loads((untemplated / "config.json").read_text())
    data = tmp_path / "asked.jsonl"
    questions = ["Name it", "Name it " + "and that " * 12]
    data.write_text("".join(json.dumps({"question": q, "answer": "the Rhine"}) + "\n" for q in questions))
    for context in (2048, 130):
        (untemplated / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
        asked = ["--data", data, "--generate", "--shots", 1, "--shots-from", rows, "--max-new-tokens", 4, "--json"]
        done = run_cli("evaluate", "--base", untemplated, "--adapter", tmp_path / "a", *asked, "--device", "cpu")
        counts = {model["generated"]["questions"] for model in json.loads(done.stdout)["models"]}
        assert len(counts) == 1
        assert counts == {2 if context == 2048 else 1}


@pytest.mark.parametrize("has_config", [True, False])
def test_results_declare_their_end_token_and_unmerge_restores_the_bases_files(
    run_cli, llama, copy_of, rows, tmp_path, has_config
):
    base = copy_of(llama, "base")
    edit_json(base / "config.json", eos_token_id=0, pad_token_id=1)
    own = {"eos_token_id": 0, "temperature": 0.6, "pad_token_id": 1}
    (base / "generation_config.json").unlink(missing_ok=True)
    if has_config:
        (base / "generation_config.json").write_text(json.dumps(own))
    before = GenerationConfig.from_pretrained(base).to_dict() if has_config else None
    end = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    assert run_cli(*train(base, rows, "a")).code == 0
    for kind, made in (("merge", "m"), ("full", "f")):
        if kind == "merge":
            told = run_cli("merge", base, tmp_path / "a", "-o", tmp_path / made)
            assert "generation_config.json: taken from the adapter" in told.stdout
        else:
            assert run_cli(*train(base, rows, made, "--method", "full")).code == 0
        found = GenerationConfig.from_pretrained(tmp_path / made)
        assert (found.eos_token_id, found.pad_token_id) == ([0, end], 1)
        assert before is None or found.to_dict() == before | {"eos_token_id": [0, end]}
        assert run_cli("verify", tmp_path / made).code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert end in model.generation_config.eos_token_id  # where generate() stops
    assert run_cli("unmerge", tmp_path / "m", "-o", tmp_path / "u", "--adapter", tmp_path / "a").code == 0
    names = [path.name for path in base.iterdir()]
    assert sorted(names) == sorted(p.name for p in (tmp_path / "u").iterdir() if p.name != "adaptkit-manifest.json")
    assert all((tmp_path / "u" / name).read_bytes() == (base / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"\xff", 5, "jinja: not UTF-8"),
        (b"\n{% for m in %}", 5, "invalid chat template (line 2: "),
        (b"{{ " + b"(" * 3000 + b"1" + b")" * 3000 + b" }}", 5, "invalid chat template ("),
        (b"{{ messages[1].content }}", 5, "line 1: the chat template refuses the conversation"),
    ],
)
def test_invalid_template_files_are_refused(run_cli, untemplated, rows, tmp_path, content, code, said):
    path = tmp_path / "bad.jinja"
    path.write_bytes(content)
    done = run_cli(*train(untemplated, rows, "a", "--chat-template", path))
    assert (done.code, done.stdout) == (code, "")
    assert said in done.stderr
    assert "hint: " in done.stderr
    assert not list(tmp_path.glob("a*"))
