"""Truncated, dropped and unused data are counted and named; no row is on both sides of a split."""

import hashlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.data.dataset import load_data
from adaptkit.data.encoding import IGNORED
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import DataError


def write(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LONG_QUESTION = {"instruction": "x " * 200, "output": "lost"}
LONG_ANSWER = {"instruction": "x", "output": "y " * 200}
SHORT = {"instruction": "x", "output": "y"}


def test_long_samples_are_truncated_and_counted_and_dropped_ones_named(tokenizer, tmp_path):
    path = write(tmp_path, LONG_QUESTION, LONG_ANSWER, SHORT)
    dataset = load_data([path], tokenizer, 100)
    assert (len(dataset.samples), dataset.truncated, dataset.dropped) == (2, 1, 1)
    assert max(len(sample.ids) for sample in dataset.samples) == 100
    assert dataset.masked == (f"{path}, line 1",)
    whole = load_data([path], tokenizer, 10_000)
    longest = max(whole.samples, key=lambda sample: len(sample.ids))
    assert (dataset.longest, dataset.longest_at) == (len(longest.ids), longest.source)


def test_long_samples_are_dropped_or_refused_on_demand(tokenizer, tmp_path):
    path = write(tmp_path, SHORT, LONG_ANSWER)
    dataset = load_data([path], tokenizer, 100, too_long="drop")
    assert ([s.source for s in dataset.samples], dataset.truncated, dataset.dropped) == ([f"{path}, line 1"], 0, 1)
    with pytest.raises(DataError, match=rf"line 2: {dataset.longest} tokens are more than max_length 100"):
        load_data([path], tokenizer, 100, too_long="error")


def test_samples_longer_than_the_models_context_are_refused(tokenizer, tmp_path):
    path = write(tmp_path, SHORT, LONG_ANSWER)
    with pytest.raises(DataError, match=r"line 2: \d+ tokens are longer than the model\'s context of 128") as raised:
        load_data([path], tokenizer, 1024, context=128)
    assert raised.value.hint == "use --max-length 128"
    assert load_data([path], tokenizer, 128, context=128).truncated == 1


def test_every_source_is_reported(tokenizer, tmp_path):
    chat = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
    first = write(tmp_path, SHORT | {"id": 1}, chat, SHORT)
    second = write(tmp_path, {"text": "plain"}, name="text.jsonl")
    dataset = load_data([first, second], tokenizer, 99)
    one, other = dataset.sources
    assert (one.name, one.rows, one.samples, one.layouts) == (str(first), 3, 3, {"instruction": 2, "conversations": 1})
    assert (one.unused, other.unused) == (("id",), ())
    assert other.layouts == {"text": 1}
    assert one.sha256 == hashlib.sha256(first.read_bytes()).hexdigest()
    assert [sample.origin for sample in dataset.samples] == [0, 0, 0, 1]
    assert one.tokens + other.tokens == sum(len(sample.ids) for sample in dataset.samples)
    assert one.answer_tokens == sum(
        label != IGNORED for sample in dataset.samples[:3] for label in list(sample.labels)[1:]
    )


def test_samples_do_not_depend_on_how_many_are_tokenized_at_a_time(tokenizer, tmp_path):
    rows = [{"instruction": f"x {n}", "output": f"y {n * n}"} for n in range(1001)]
    together = load_data([write(tmp_path, *rows)], tokenizer, 99).samples
    alone = load_data([write(tmp_path, rows[1000], name="one.jsonl")], tokenizer, 99).samples[0]
    assert len(together) == 1001
    assert (together[1000].ids, together[1000].labels) == (alone.ids, alone.labels)
    assert together[1000].source.endswith("line 1001")


def test_layout_and_loss_on_are_applied(tokenizer, tmp_path):
    path = write(tmp_path, SHORT | {"text": "plain"})
    (sample,) = load_data([path], tokenizer, 99, layout="text").samples
    assert tokenizer.decode(list(sample.ids)) == "plain<|im_end|>"
    (sample,) = load_data([path], tokenizer, 99, layout="instruction", loss_on="all").samples
    assert list(sample.ids) == list(sample.labels)


def test_rows_with_an_empty_answer_are_counted_and_the_first_is_named(tokenizer, tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output\nx,y\nq,\nq, \n")
    chat = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "fine"}]}
    data = load_data([tmp_path / "rows.csv", write(tmp_path, chat, {"text": "plain"})], tokenizer, 99)
    assert (data.empty, len(data.samples)) == (2, 5)
    assert "rows.csv, line 3" in data.empty_at
    earlier = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}, *chat["messages"]]
    path = write(tmp_path, {"messages": earlier}, name="earlier.jsonl")
    assert load_data([path], tokenizer, 99).empty == 1
    assert load_data([path], tokenizer, 99, loss_on="last_answer").empty == 0


@pytest.fixture(scope="module", params=["own", "none", "without ends"])
def with_template(request, llama):
    """Tokenizers with three templates; each is kept for all examples, since a new one is given a new process."""
    tokenizer = load_tokenizer(llama)
    if request.param != "own":
        without_ends = "{% for m in messages %}{{ m.content }} {% endfor %}"
        tokenizer.chat_template = None if request.param == "none" else without_ends
    return tokenizer


@settings(max_examples=34)  # for each template
@given(answers=st.lists(st.sampled_from(["a", "a<|im_end|>", "<|im_end|> a", "a<|endoftext|>", "a<|im_end|>\n"]),
                        min_size=1, max_size=4))  # fmt: skip
def test_rows_whose_answers_end_twice_are_counted_and_the_first_is_named(with_template, tmp_path_factory, answers):
    """transformers renders both end tokens without a warning."""
    tokenizer = with_template
    rows = ({"prompt": "well?", "completion": answer} for answer in answers)
    path = write(tmp_path_factory.mktemp("twice"), *rows)
    data = load_data([path], tokenizer, 99)
    ends = re.compile(re.escape(tokenizer.eos_token) + r"\s*" + re.escape(tokenizer.eos_token))
    twice = [sample.source for sample in data.samples if ends.search(tokenizer.decode(sample.ids))]
    assert (data.twice, data.twice_at) == (len(twice), twice[0] if twice else "")


def test_end_tokens_in_messages_that_are_not_learned_are_not_counted(tokenizer, tmp_path):
    asked, said = {"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "a<|im_end|>"}
    fine = {"role": "assistant", "content": "a"}
    path = write(tmp_path, {"messages": [asked, said | {"weight": 0}, asked, fine]}, {"messages": [asked, said]})
    data = load_data([path], tokenizer, 99)
    assert (data.twice, data.twice_at.endswith("line 2")) == (1, True)
    last = write(tmp_path, {"messages": [asked, said, asked, fine]})
    assert [load_data([last], tokenizer, 99, loss_on=on).twice for on in ("answers", "last_answer")] == [1, 0]


PIECES = ["x", " ", "<", "|", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im"]
QUESTIONS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@settings(max_examples=40)
@given(questions=st.lists(QUESTIONS, min_size=1, max_size=4))
def test_rows_with_special_tokens_in_a_question_are_counted_and_the_first_is_named(
    tokenizer, tmp_path_factory, questions
):
    path = write(tmp_path_factory.mktemp("special"), *({"prompt": text, "completion": "a"} for text in questions))
    data, special = load_data([path], tokenizer, 999), set(tokenizer.all_special_ids)
    found = {line: special.intersection(tokenizer(text)["input_ids"]) for line, text in enumerate(questions, 1)}
    first = next((line for line in found if found[line]), None)
    assert data.special == sum(map(bool, found.values()))
    assert data.special_at.startswith(f"{path}, line {first}: <|" if first else "")
    assert bool(data.special_at) == bool(first)


@pytest.mark.parametrize(
    ("row", "token"),
    [
        ({"prompt": "q", "completion": "a<|im_end|>"}, None),  # ``twice`` counts it
        ({"prompt": "q", "completion": "a<|im_end|>\n"}, None),
        ({"prompt": "q", "completion": "a<|im_end|>b<|endoftext|>"}, "<|im_end|>"),
        ({"prompt": "q", "completion": "<|endoftext|>a<|im_end|>"}, "<|endoftext|>"),
        ({"prompt": "q", "completion": "<think>b</think>a"}, None),
        ({"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "completion": "a"}, "<|im_start|>"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<|im_end|>", "weight": 0},
                       {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "<|im_end|>"),
        ({"messages": [{"role": "user", "content": "q"},
                       {"role": "assistant", "content": "a", "reasoning_content": "b<|im_end|>"}]}, "<|im_end|>"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                       {"role": "user", "content": "<|im_start|>"}]}, None),  # nothing after it is learned
        ({"prompt": "<|im_start|>er", "completion": "a"}, "<|im_start|>er"),
        ({"prompt": "<tool>", "completion": "a"}, None),
        ({"text": "<|im_start|>user\nq<|im_end|>\n"}, None),
    ],
)  # fmt: skip
def test_end_tokens_after_learned_answers_tags_of_reasoning_and_texts_are_no_special_tokens_in_messages(
    llama, tmp_path, row, token
):
    tokenizer = load_tokenizer(llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|im_start|>er"]})
    tokenizer.add_tokens(["<tool>"])
    data = load_data([write(tmp_path, row)], tokenizer, 999)
    assert (data.special, data.special_at) == ((1, f"{tmp_path / 'rows.jsonl'}, line 1: {token}") if token else (0, ""))


def test_data_without_rows_without_text_or_without_fitting_samples_are_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no rows"):
        load_data([write(tmp_path)], tokenizer, 99)
    with pytest.raises(DataError, match=r"line 1: nothing to learn"):
        load_data([write(tmp_path, {"text": ""})], tokenizer, 99)
    with pytest.raises(
        DataError, match=r"no samples left; dropped 1 sample \(too long, or answer cut off, at max_length 10\)"
    ):
        load_data([write(tmp_path, LONG_QUESTION)], tokenizer, 10)


def test_unused_fields_of_rows_and_messages_are_reported(tokenizer, tmp_path):
    answer = {"role": "assistant", "content": "fine", "mood": False, "name": None, "thinking": "so"}
    path = write(tmp_path, {"messages": [{"role": "user", "content": "well?", "id": 7}, answer], "source": "me"})
    (report,) = load_data([path], tokenizer, 99).sources
    assert report.unused == ("source", "id of messages", "mood of messages")


@given(st.lists(st.sampled_from(["user", "assistant", "unlearned"]), max_size=3),
       st.sampled_from(["answers", "last_answer", "all"]))  # fmt: skip
def test_messages_after_the_last_learned_answer_are_reported_unless_they_are_read(
    tokenizer, tmp_path_factory, roles, loss_on
):
    marked = {"unlearned": {"role": "assistant", "content": "so", "weight": 0}}
    messages = [{"role": "user", "content": "well?"}, {"role": "assistant", "content": "fine"}]
    messages += [marked.get(role, {"role": role, "content": "so"}) for role in roles]
    path = write(tmp_path_factory.mktemp("tail"), {"messages": messages}, {"text": "plain"})
    data = load_data([path], tokenizer, 999, loss_on=loss_on)
    is_read = "".join(tokenizer.decode(data.samples[0].ids)).count("<|im_start|>") == len(messages) + 1
    assert data.sources[0].unused == (() if is_read else ("messages after the last learned answer",))


def test_a_template_that_renders_only_contents_leaves_prompts_and_completions_unchanged(llama, tmp_path):
    """As TRL treats strings, including end tokens in them, and as docs/data.md says."""
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    prompts = "a", "a\n", " a. b: ", "\n\na\n", " ", "a<|im_end|>"
    completions = "a", " a", "\nb a.", "\n\n b\n\na", "a<|im_end|>", ""
    rows = [{"prompt": prompt, "completion": completion} for prompt in prompts for completion in completions]
    samples = load_data([write(tmp_path, *rows)], tokenizer, 99).samples
    for row, sample in zip(rows, samples, strict=True):
        learned = [token for token, label in zip(sample.ids, sample.labels, strict=True) if label == token]
        completion = row["completion"].removesuffix(tokenizer.eos_token) + tokenizer.eos_token
        assert tokenizer.decode(sample.ids) == row["prompt"] + completion
        assert tokenizer.decode(learned) == completion


def test_every_row_has_a_unique_source(tokenizer, tmp_path):
    """Splitting depends on it, also with several files of different kinds."""
    lines = write(tmp_path, *[SHORT] * 3)
    other = write(tmp_path, *[SHORT] * 3, name="other.jsonl")
    table = tmp_path / "rows.csv"
    table.write_text('instruction,output\nx,"y\nz"\nx,y\n')
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps([SHORT] * 3))
    samples = load_data([lines, other, table, listed], tokenizer, 99).samples
    assert len(samples) == len({sample.source for sample in samples}) == 11
