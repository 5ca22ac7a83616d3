"""What is cut, left out or not used is counted and named."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.checkpoint.architecture import load_tokenizer
from adaptkit.errors import DataError
from adaptkit.training.data.dataset import load_data, split
from adaptkit.training.data.samples import IGNORED, Sample


@pytest.fixture(scope="module")
def tokenizer(llama):
    return load_tokenizer(llama)


def write(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LONG_QUESTION = {"instruction": "x " * 200, "output": "lost"}
LONG_ANSWER = {"instruction": "x", "output": "y " * 200}
SHORT = {"instruction": "x", "output": "y"}


def test_long_samples_are_cut_and_counted_and_the_lost_ones_named(tokenizer, tmp_path):
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
    with pytest.raises(DataError, match=rf"line 2: {dataset.longest} tokens, more than max_length 100"):
        load_data([path], tokenizer, 100, too_long="error")


def test_what_the_model_cannot_read_is_refused(tokenizer, tmp_path):
    path = write(tmp_path, SHORT, LONG_ANSWER)
    with pytest.raises(DataError, match=r"line 2: \d+ tokens, and the model reads at most 128") as raised:
        load_data([path], tokenizer, 1024, context=128)
    assert raised.value.hint == "max_length: 128"
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


def test_a_layout_and_what_is_learned_can_be_asked_for(tokenizer, tmp_path):
    path = write(tmp_path, SHORT | {"text": "plain"})
    (sample,) = load_data([path], tokenizer, 99, layout="text").samples
    assert tokenizer.decode(list(sample.ids)) == "plain<|im_end|>"
    (sample,) = load_data([path], tokenizer, 99, layout="instruction", loss_on="all").samples
    assert list(sample.ids) == list(sample.labels)


def test_an_empty_answer_teaches_to_end_the_turn(tokenizer, tmp_path):
    (sample,) = load_data([write(tmp_path, {"instruction": "x", "output": ""})], tokenizer, 99).samples
    assert [label for label in sample.labels if label != IGNORED] == [tokenizer.eos_token_id]


def test_no_rows_no_text_and_no_room_are_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="there are no rows"):
        load_data([write(tmp_path)], tokenizer, 99)
    with pytest.raises(DataError, match=r"line 1: there is nothing to learn"):
        load_data([write(tmp_path, {"text": ""})], tokenizer, 99)
    with pytest.raises(DataError, match="all 1 samples are too long, or lose their answer, at max_length 10"):
        load_data([write(tmp_path, LONG_QUESTION)], tokenizer, 10)


def test_a_template_that_refuses_is_named_with_file_and_line(llama, tmp_path):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = "{{ raise_exception('no system prompt here') }}"
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: the chat template refuses .*no system prompt here"):
        load_data([write(tmp_path, SHORT)], tokenizer, 99)


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_loses_and_repeats_nothing(count, fraction, seed):
    samples = [Sample((i,), (i,)) for i in range(count)]
    train, held_out = split(samples, fraction, seed)
    assert sorted(s.ids[0] for s in train + held_out) == list(range(count))
    assert train
    assert held_out
