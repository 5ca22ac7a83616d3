"""Loss is on the answer, its end-of-turn included, and on nothing else."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.checkpoint.architecture import load_tokenizer
from adaptkit.errors import DataError, UsageError
from adaptkit.training import data


@pytest.fixture(scope="module")
def tokenizer(llama):
    return load_tokenizer(llama)


def labelled(sample, tokenizer):
    return tokenizer.decode([label for label in sample.labels if label != data.IGNORED])


def rows(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Name it", "context": "a river", "output": "the Rhine"},
        {"instruction": "Name it", "input": "a river", "output": "the Rhine"},
        {"prompt": "Name it", "completion": "the Rhine"},
        {"messages": [{"role": "user", "content": "Name it"}, {"role": "assistant", "content": "the Rhine"}]},
    ],
)
def test_every_layout_learns_the_answer_and_its_end(row, tokenizer, tmp_path):
    dataset = data.load_data([rows(tmp_path, row)], tokenizer, 512)
    (sample,) = dataset.samples
    assert labelled(sample, tokenizer) == "the Rhine<|im_end|>"
    assert tokenizer.decode(list(sample.ids)).startswith("<|im_start|>system\n")
    if "context" in row or "input" in row:
        assert "Name it\n\na river<|im_end|>" in tokenizer.decode(list(sample.ids))


def test_every_turn_of_the_assistant_carries_loss(tokenizer):
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second"},
    ]
    sample = data.encode(messages, tokenizer)
    assert labelled(sample, tokenizer) == "first<|im_end|>second<|im_end|>"


@given(st.text(min_size=1).filter(lambda t: t.strip()), st.text(min_size=1).filter(lambda t: t.strip()))
def test_labels_are_a_suffix_of_the_ids_for_any_text(tokenizer, question, answer):
    sample = data.encode([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenizer)
    marked = [i for i, label in enumerate(sample.labels) if label != data.IGNORED]
    assert marked == list(range(marked[0], marked[-1] + 1))
    assert all(sample.labels[i] == sample.ids[i] for i in marked)
    assert sample.ids[marked[-1]] == tokenizer.eos_token_id


def test_the_prompt_ends_where_the_answer_begins(tokenizer):
    sample = data.encode([{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}], tokenizer)
    start = next(i for i, label in enumerate(sample.labels) if label != data.IGNORED)
    assert list(sample.ids[:start]) == data.prompt_ids("Where?", tokenizer)


def test_long_samples_are_cut_and_counted(tokenizer, tmp_path):
    path = rows(
        tmp_path,
        {"instruction": "x " * 200, "output": "lost"},
        {"instruction": "x", "output": "y " * 200},
        {"instruction": "x", "output": "y"},
    )
    dataset = data.load_data([path], tokenizer, 100)
    assert (len(dataset.samples), dataset.truncated, dataset.dropped) == (2, 2, 1)
    assert max(len(sample.ids) for sample in dataset.samples) == 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"instruction": "no answer"}, "line 2: has no output or response or completion"),
        ({"output": "no question"}, "line 2: has no instruction or prompt"),
        ("{not json", "line 2: not JSON"),
        ("[1, 2]", "line 2: expected an object"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 2: no message is the assistant's"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 2: messages must be"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "line 2: messages must be"),
        ({"instruction": "x", "context": 5, "output": "y"}, "line 2: the context is no text"),
        ({"instruction": "half a character: \ud800", "output": "y"}, "line 2: has no instruction"),
        ('{"n": ' + "9" * 5000 + "}", "line 2: not JSON"),
        ('{"n": ' + "[" * 100_000, "line 2: not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line, message, tokenizer, tmp_path):
    path = rows(tmp_path, {"instruction": "good", "output": "row"}, line)
    with pytest.raises(DataError, match=re.escape(message)):
        data.load_data([path], tokenizer, 99)


def test_a_mark_windows_line_ends_and_separators_inside_strings_are_read(tokenizer, tmp_path):
    row = '{"instruction": "one\u2028line\u0085", "output": "y"}\r\n'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(("\ufeff" + row + row).encode())
    assert len(data.load_data([path], tokenizer, 99).samples) == 2


def test_a_prompt_that_is_not_utf8_is_refused(tokenizer):
    with pytest.raises(UsageError, match="not UTF-8"):
        data.prompt_ids("\udcff", tokenizer)


def test_an_empty_answer_teaches_to_end_the_turn(tokenizer, tmp_path):
    (sample,) = data.load_data([rows(tmp_path, {"instruction": "x", "output": ""})], tokenizer, 99).samples
    assert labelled(sample, tokenizer) == "<|im_end|>"


def test_no_rows_and_no_room_are_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="there are no rows"):
        data.load_data([rows(tmp_path)], tokenizer, 99)
    with pytest.raises(DataError, match="all 1 rows lose their answer at 10 tokens"):
        data.load_data([rows(tmp_path, {"instruction": "word " * 20, "output": "y"})], tokenizer, 10)
    with pytest.raises(DataError, match=r"expected a \.jsonl file"):
        data.load_data([tmp_path / "rows.csv"], tokenizer, 10)
    with pytest.raises(DataError, match="cannot be read"):
        data.load_data([tmp_path / "absent.jsonl"], tokenizer, 10)


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_loses_and_repeats_nothing(count, fraction, seed):
    samples = [data.Sample((i,), (i,)) for i in range(count)]
    train, held_out = data.split(samples, fraction, seed)
    assert sorted(s.ids[0] for s in train + held_out) == list(range(count))
    assert train
    assert held_out


def test_a_template_that_rewrites_earlier_turns_is_refused(llama):
    """Labels by position would then be put on the user's words."""
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [("user", "one"), ("assistant", "<think>long</think>first"), ("user", "two"), ("assistant", "second")]
    messages = [{"role": role, "content": content} for role, content in turns]
    with pytest.raises(DataError, match="rewrites the conversation around message 2"):
        data.encode(messages, tokenizer)
    assert labelled(data.encode(messages[:2], tokenizer), tokenizer) == "<think>long</think>first<|im_end|>"


def test_a_template_that_refuses_is_named_with_file_and_line(llama, tmp_path):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = "{{ raise_exception('no system prompt here') }}"
    path = rows(tmp_path, {"prompt": "x", "completion": "y"})
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: the chat template refuses .*no system prompt here"):
        data.load_data([path], tokenizer, 99)


def test_a_conversation_that_the_assistant_begins_is_refused(tokenizer):
    with pytest.raises(DataError, match="the assistant speaks first"):
        data.encode([{"role": "assistant", "content": "hello"}], tokenizer)
