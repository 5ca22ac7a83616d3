"""``adaptkit evaluate`` on several models: table, JSON document, page, file of answers, and errors for bad input."""

import json
import re
import shutil

import pytest
import tiny
from html_pages import Parsed

from adaptkit.cli.main import main
from adaptkit.data.tokenizer_files import load_tokenizer


@pytest.fixture(scope="module")
def compared(llama, adapter, second_adapter, instructions, made, run_cli):
    """Folder and JSON document of a run that uses every kind of evaluation and output."""
    folder = made / "compared"
    folder.mkdir()
    (folder / "prose.txt").write_text("the rivers in the north are quiet and the metals at night are not. " * 12)
    examples = tiny.write_instructions(folder / "examples.jsonl", seed=9)
    done = run_cli(
        "evaluate", "--base", llama, "--adapter", adapter, "--adapter", second_adapter, "--data", instructions,
        "--text", folder / "prose.txt", "--reference", llama, "--window", 64, "--generate", "--samples", 4,
        "--max-new-tokens", 6, "--shots", 1, "--shots-from", examples, "--prompt", "hello", "--samples-file",
        folder / "answers.jsonl", "--html", folder / "page.html", "--compute-dtype", "float32", "--json",
    )  # fmt: skip
    assert (done.code, done.stderr) == (0, "")
    return folder, json.loads(done.stdout)


def test_models_in_the_cache_of_the_hub_are_named_by_their_repositories(llama, tmp_path, run_cli):
    cached = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    shutil.copytree(llama, cached)
    (tmp_path / "prose.txt").write_text("the rivers in the north are quiet. " * 12)
    asked = ("evaluate", "--base", cached, "--text", tmp_path / "prose.txt", "--reference", cached)
    asked += ("--window", 64, "--html", tmp_path / "page.html")
    for more in ((), ("--base", llama)):
        done = run_cli(*asked, *more)
        page = (tmp_path / "page.html").read_text()
        assert (done.code, "0" * 40 in done.stdout + page) == (0, False), done.stderr
        assert ("org/name" in done.stdout, "org/name" in page) == (True, True)


def test_the_document_has_a_report_for_every_model_and_its_forgetting(compared, llama, adapter, second_adapter):
    _, document = compared
    assert [(m["base"], m["adapter"], m["shots"]) for m in document["models"]] == [
        (str(llama), None, 0), (str(llama), None, 1), (str(llama), str(adapter), 0),
        (str(llama), str(second_adapter), 0),
    ]  # fmt: skip
    assert document["models"][0]["text"]["kl_divergence"] == 0
    assert document["models"][2]["text"]["kl_divergence"] > 0
    assert document["models"][1]["text"] is None
    assert [line["model"] for line in document["forgetting"]] == [f"{llama} + {a}" for a in (adapter, second_adapter)]
    assert {"bleu", "nist", "meteor", "rouge_l", "cider"} <= document["models"][3]["generated"]["scores"].keys()


def test_only_answers_cut_at_the_token_limit_are_marked_as_cut(llama, run_cli, tmp_path):
    """A random model never ends its answer; if every token is an end token, the answer is empty."""
    silent, mute = (shutil.copytree(llama, tmp_path / name) for name in ("silent", "mute"))
    config = json.loads((llama / "config.json").read_text())
    every = {"eos_token_id": list(range(config["vocab_size"]))}
    (silent / "generation_config.json").write_text(json.dumps(every))
    (mute / "generation_config.json").unlink()
    (mute / "config.json").write_text(json.dumps(config | every))
    mark = "… (cut at --max-new-tokens)"
    for base, cut in (llama, ["hello"]), (silent, []), (mute, []):
        asked = ["evaluate", "--base", base, "--prompt", "hello", "--max-new-tokens", 3]
        document = json.loads(run_cli(*asked, "--json").stdout)
        assert document["cut_answers"] == cut
        assert mark not in document["answers"]["hello"]
        for more in (), ("--compare",):
            assert (mark in run_cli(*asked, *more, "--html", tmp_path / "page.html").stdout) == bool(cut)
            assert (mark in (tmp_path / "page.html").read_text()) == bool(cut)


def test_the_answers_file_has_every_models_answer_to_every_question(compared, instructions):
    folder, document = compared
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * len(document["models"])
    asked = [json.dumps(line["messages"]) for line in lines]
    assert asked == asked[:4] * len(document["models"])
    outputs = {json.loads(line)["output"] for line in instructions.read_text().splitlines()}
    assert all(set(line["references"]) <= outputs and line["references"] for line in lines)


def test_only_an_earlier_answers_file_is_replaced(compared, llama, instructions, run_cli, tmp_path):
    folder, _ = compared
    answers, config = tmp_path / "answers.jsonl", tmp_path / "config.json"
    shutil.copy(folder / "answers.jsonl", answers)
    shutil.copy(llama / "config.json", config)
    command = ["evaluate", "--base", llama, "--data", instructions, "--generate", "--samples", 1, "--max-new-tokens", 2]
    assert run_cli(*command, "--samples-file", answers).code == 0
    assert len(answers.read_text().splitlines()) == 1
    refused = run_cli(*command, "--samples-file", config)
    assert (refused.code, "is not a file of answers" in refused.stderr) == (2, True)
    assert config.read_bytes() == (llama / "config.json").read_bytes()


def test_of_several_processes_only_the_first_prints_and_writes_answers(llama, instructions, run_cli, tmp_path):
    given = ["evaluate", "--base", llama, "--data", instructions, "--generate", "--samples", 1, "--max-new-tokens", 1]
    for rank in ("0", "1"):
        torchrun = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": rank}
        done = run_cli(*given, "--json", "--samples-file", tmp_path / f"samples-{rank}", **torchrun)
        assert done.code == 0, done.stderr
        assert bool(done.stdout) == (tmp_path / f"samples-{rank}").exists() == (rank == "0")
    failed = run_cli("evaluate", "--base", tmp_path / "absent", "--data", instructions, "--json", **torchrun)
    assert (failed.code, failed.stdout) == (2, "")
    assert failed.stderr.startswith("process 1: error: ")


def test_the_page_shows_the_numbers_of_the_document(compared):
    folder, document = compared
    tables = Parsed((folder / "page.html").read_text()).tables
    heading, *rows = tables["Models"]
    assert [row[0] for row in rows] == ["llama", "llama, 1 shot", "llama + adapter", "llama + second-adapter"]
    for row, model in zip(rows, document["models"], strict=True):
        assert row[heading.index("loss")] == f"{model['loss']:.4f}"
        assert row[heading.index("ROUGE-L")] == f"{model['generated']['scores']['rouge_l']:.4f}"
        trained = model["trained_parameters"]
        assert row[heading.index("trained")] == ("–" if trained is None else f"{trained:,}")


def test_empty_answers_are_counted_and_undefined_scores_are_listed(compared, llama, copy_of, instructions, run_cli):
    folder, document = compared
    said = [json.loads(line)["answer"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    counts = [sum(not answer for answer in said[start : start + 4]) for start in range(0, len(said), 4)]
    assert [model["generated"]["empty"] for model in document["models"]] == counts
    silent = copy_of(llama)  # ends every answer immediately
    stops = list(range(load_tokenizer(silent).vocab_size))
    (silent / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    for bases in (["--base", silent], ["--base", llama, "--base", silent]):
        done = run_cli("evaluate", *bases, "--data", instructions, "--generate", "--samples", 3)
        assert (done.code, "3 empty answers" in done.stdout) == (0, True)
    for more in (), ("--compare",):  # scores that cannot be computed are listed with a reason
        done = run_cli("evaluate", "--base", silent, "--data", instructions, "--generate", "--samples", 1, *more)
        for score in ("NIST", "CIDEr"):
            assert re.search(rf"{score}:? +none: ", done.stdout), done.stdout


def test_chat_template_variables_are_passed_to_the_template(llama, copy_of, instructions, run_cli):
    model = copy_of(llama)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("{% if quick %}Hurry! {% endif %}" + template)
    command = ["evaluate", "--base", model, "--data", instructions, "--text", instructions, "--device", "cpu", "--json"]
    slow, quick = (json.loads(run_cli(*command, *more).stdout) for more in ((), ("--chat-template-kwargs", "quick=1")))
    assert slow["answer_tokens"] == quick["answer_tokens"]
    assert slow["loss"] != quick["loss"]
    (model / "chat_template.jinja").write_text("Hurry! " + template)
    told = json.loads(run_cli(*command).stdout)
    assert (told["loss"], told["text"]) == (quick["loss"], quick["text"])


def test_unused_columns_and_a_missing_chat_template_are_noted(llama, copy_of, run_cli, tmp_path):
    """As in training: a misspelled column would otherwise leave out the context silently."""
    bare, rows = copy_of(llama), tmp_path / "rows.jsonl"
    (bare / "chat_template.jinja").unlink()
    rows.write_text(json.dumps({"instruction": "ask", "contxt": "of rivers", "output": "yes"}) + "\n")
    unused, lines = f"{rows}: not used: contxt", "no chat template: messages are joined as plain lines"
    for more, told in ((["--base", llama], False), (["--base", bare], True), (["--base", llama, "--base", bare], True)):
        done = run_cli("evaluate", *more, "--data", rows, "--html", tmp_path / "page.html")
        assert (done.code, done.stderr) == (0, "")
        notes = [line.split(None, 1)[1] for line in done.stdout.splitlines() if line.startswith("note")]
        assert unused in notes
        assert any(note.startswith(lines) for note in notes) is told
    rows.write_text(json.dumps({"text": "of rivers"}) + "\n")
    told = run_cli("evaluate", "--base", bare, "--data", rows).stdout
    assert not [line for line in told.splitlines() if line.startswith("note")]


def test_perplexities_over_different_tokens_are_noted(llama, gpt2, copy_of, run_cli, tmp_path):
    """Even if the vocabularies are equally large: the other tokenizer prepends a token to texts."""
    from tokenizers.processors import TemplateProcessing

    other, begin = copy_of(llama), "<|im_start|>"
    tokenizer = load_tokenizer(other)
    marks = [(begin, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=marks)
    tokenizer.save_pretrained(other)
    (tmp_path / "prose.txt").write_text("the rivers in the north are quiet and the metals at night are not. " * 12)
    more = ("--base", llama, "--text", tmp_path / "prose.txt", "--window", 32, "--max-tokens", 64)
    for base, told in ((other, True), (gpt2, False)):
        done = run_cli("evaluate", "--base", base, *more)
        assert (done.code, done.stderr) == (0, "")
        assert ("perplexities of text are over different tokens" in done.stdout) is told


def test_the_table_is_aligned_and_omits_columns_without_measurements(llama, adapter, instructions, run_cli):
    done = run_cli("evaluate", "--base", llama, "--adapter", adapter, "--compare", "--data", instructions)
    assert (done.code, done.stderr) == (0, "")
    heading, first, second = done.stdout.splitlines()[:3]
    assert heading.split() == ["model", "trained", "share", "%", "loss", "perplexity"]
    assert len(heading) == len(first) == len(second)
    assert first.startswith("llama  ")
    assert second.startswith("llama + adapter")


def test_bad_requests_print_only_an_error_and_a_hint_and_exit_with_the_documented_code(
    llama, adapter, certified, instructions, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "unanswered.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "a " * 600, "output": "b"}) + "\n")
    (tmp_path / "text.txt").write_text("words " * 50)
    (tmp_path / "two.jsonl").write_text(json.dumps({"instruction": "a", "output": "b", "text": "a b"}) + "\n")
    other, wider = tiny.write_llama(tmp_path / "other", seed=5), tiny.write_llama(tmp_path / "wider", seed=6)
    of_another = certified(adapter, other)
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    monkeypatch.setattr("signal.signal", lambda number, handler: None)  # pytest keeps its own
    cases = [
        (["--data", tmp_path / "empty.jsonl"], 5, "empty.jsonl: no rows"),
        (["--data", tmp_path / "unanswered.jsonl", "--generate"], 5, "line 2: no column output"),
        (["--data", tmp_path / "long.jsonl", "--generate"], 5, "fits a model's context with"),
        (["--data", instructions, "--adapter", of_another], 4, "belongs to another base"),
        (["--data", instructions, "--adapter", of_another, "--compare"], 4, "belongs to another base"),
        (["--data", instructions, "--base", llama], 2, "given twice"),
        (["--data", instructions, "--adapter", adapter, "--adapter", adapter], 2, f"{adapter}: is given twice"),
        (["--text", tmp_path / "text.txt", "--window", 513], 2, "longer than"),
        (["--text", tmp_path / "text.txt", "--generate"], 2, "generate: needs data"),
        (["--data", instructions, "--shots", 2], 2, "--shots: must be given together with --shots-from"),
        (["--data", instructions, "--max-tokens", 64], 2, "--max-tokens: needs text"),
        (["--data", instructions, "--shots", 99, "--shots-from", instructions, "--generate"], 5, "expected 99 exa"),
        (["--data", instructions, "--samples-file", tmp_path / "a.jsonl"], 2, "needs --generate"),
        (["--data", instructions, "--generate", "--samples-file", tmp_path / "no" / "a"], 2, "cannot write a file"),
        (["--data", instructions, "--generate", "--samples-file", instructions], 2, "already exists, and is not a"),
        (["--data", instructions, "--generate", "--samples-file", tmp_path / "a", "--html", tmp_path / "a"], 2, "page"),
        (["--data", tmp_path / "two.jsonl", "--layout", "prompt"], 5, "two.jsonl, line 1: no column prompt"),
        (["--data", tmp_path / "two.jsonl"], 5, "more than one layout"),
        (["--prompt", "words " * 400], 2, "are longer than the model's context of "),
        (["--data", instructions, "--html", tmp_path], 2, "is a directory"),
        (["--data", instructions, "--base", wider], 5,
         f"{wider}: model.embed_tokens.weight: expected shape [309, 64], found [301, 64]"),
    ]  # fmt: skip
    for arguments, code, message in cases:
        monkeypatch.setattr("sys.argv", ["adaptkit", "evaluate", "--base", str(llama), *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        assert (stopped.value.code, said.out) == (code, ""), (arguments, said)
        error, hint = said.err.splitlines()
        assert error.startswith("error: "), arguments
        assert message in error, (arguments, said.err)
        assert re.match(r"hint: \S", hint), arguments
