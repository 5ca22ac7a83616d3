"""An epoch draws the requested shares, each source's samples equally often; no row is on both sides of a split."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.data.batches import Batches
from adaptkit.data.dataset import load_data
from adaptkit.data.encoding import Sample
from adaptkit.data.sampling import Mixture, default_held_out, order, split
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import ConfigError, DataError
from adaptkit.training.config import TrainConfig

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=4)


def samples(counts):
    """Make samples (s, n, 0), with n from 0 for each source s, not sorted by source."""
    made = [Sample((s, n, 0), (s, n, 0), origin=s) for s, count in enumerate(counts) for n in range(count)]
    return made[::2] + made[1::2]


@given(sizes, st.lists(st.floats(0.2, 5), min_size=4, max_size=4), st.integers(0, 3))
def test_shares_are_met_and_samples_of_a_source_are_drawn_equally_often(counts, weights, seed):
    some, weights = samples(counts), weights[: len(counts)]
    try:
        mixture = Mixture.of(some, weights, ["a", "b", "c", "d"][: len(counts)])
    except ConfigError:  # a share is less than a sample
        assert min(weights) / sum(weights) * len(some) < 1
        return
    assert sum(mixture.counts) == len(some)
    for count, weight in zip(mixture.counts, weights, strict=True):
        assert abs(count - len(some) * weight / sum(weights)) < 1
    seen = Counter(number for epoch in range(5) for number in mixture.draw(epoch, seed))
    for members, count in zip(mixture.members, mixture.counts, strict=True):
        times = [seen[number] for number in members]
        assert sum(times) == 5 * count
        assert max(times) - min(times) <= 1
    assert mixture.draw(3, seed) == mixture.draw(3, seed)


@pytest.mark.parametrize("pack_length", [None, 7])
def test_steps_contain_the_drawn_samples_in_shuffled_order_packed_or_not(pack_length):
    some = samples([12, 30])
    mixture = Mixture.of(some, [3, 1], ["a", "b"])
    batches = Batches(some, batch_size=2, mixture=mixture, pack_length=pack_length)
    steps = [batches.rows(step) for step in range(4 * batches.steps_per_epoch)]
    drawn = [sample.ids[:2] for rows in steps for row in rows for sample in row]
    expected = [some[number].ids[:2] for epoch in range(5) for number in mixture.draw(epoch, 0)]
    assert not Counter(drawn) - Counter(expected)
    assert drawn != sorted(drawn)
    fresh = Batches(some, batch_size=2, mixture=mixture, pack_length=pack_length)
    assert [fresh.rows(step) for step in reversed(range(len(steps)))] == steps[::-1]
    first = [sample.origin for rows in steps[: batches.steps_per_epoch] for row in rows for sample in row]
    assert Counter(first) == {0: mixture.counts[0], 1: mixture.counts[1]} == {0: 32, 1: 10}


def test_the_largest_batch_covers_the_samples_of_all_epochs():
    """It determines checkpointing and predicted memory. Here some first epochs do not draw the long sample."""
    sizes = [(9 if s and n == 7 else 2, s) for s in (0, 1) for n in range(20)]
    some = [Sample((1,) * size, (1,) * size, origin=s) for size, s in sizes]
    in_first_epochs = set()
    for seed in range(9):
        batches = Batches(some, batch_size=4, seed=seed, mixture=Mixture.of(some, [9, 1], ["a", "b"]))
        count = batches.steps_per_epoch
        longest = [max(len(sample.ids) for (sample,) in batches.rows(step)) for step in range(10 * count)]
        assert batches.largest() == (4, max(longest)) == (4, 9)
        in_first_epochs.add(max(longest[:count]))
    assert in_first_epochs == {2, 9}


def test_no_batch_of_a_packed_mixture_is_larger_than_the_largest():
    for seed in range(30):
        random = torch.Generator().manual_seed(seed)
        sizes = torch.randint(2, 12, (30,), generator=random).tolist()
        some = [Sample((1,) * size, (1,) * size, origin=n % 2) for n, size in enumerate(sizes)]
        mixture = Mixture.of(some, [3, 1], ["a", "b"])
        batches = Batches(some, batch_size=4, micro_batch_size=3, seed=seed, mixture=mixture, pack_length=21)
        rows, length = batches.largest()
        for step in range(8 * batches.steps_per_epoch):
            for batch in batches.micro_batches(step):
                assert batch.ids.shape[0] <= rows
                assert batch.ids.shape[1] <= length


def weights_of(mixture, data):
    return TrainConfig(base="base", data=tuple(data), mixture=mixture).mixture_weights()


def test_weights_are_given_by_path_or_file_name_and_default_to_one():
    sources = ["data/task.jsonl", "data/general.jsonl", "org/name:train"]
    assert weights_of({"general.jsonl": 0.5, "org/name:train": 2}, sources) == [1.0, 0.5, 2]
    assert weights_of(None, sources) is None
    with pytest.raises(ConfigError, match=r"'gneral.jsonl' is not one of the data") as raised:
        weights_of({"gneral.jsonl": 1}, sources)
    assert raised.value.hint == "name one of the data: data/task.jsonl, data/general.jsonl, org/name:train"
    with pytest.raises(ConfigError, match=r"'a.jsonl' is named twice"):
        TrainConfig(base="x", data=["d/a.jsonl"], mixture={"d/a.jsonl": 2, "a.jsonl": 3})
    with pytest.raises(ConfigError, match=r"'a.jsonl' is the name of several"):
        weights_of({"a.jsonl": 1}, ["x/a.jsonl", "y/a.jsonl"])


def test_files_of_the_same_name_have_separate_weights_in_the_record():
    config = TrainConfig(base="base", data=("x/a.jsonl", "y/a.jsonl"), mixture={"x/a.jsonl": 9, "y/a.jsonl": 1})
    assert config.recorded()["mixture"] == config.decisive()["mixture"] == [9, 1]


def test_a_source_of_which_no_sample_would_be_drawn_is_refused():
    with pytest.raises(ConfigError, match="mixture: b: no sample would be drawn"):
        Mixture.of(samples([5, 5]), [1, 0.001], ["a", "b"])
    with pytest.raises(ConfigError, match="mixture: b: no sample would be drawn") as raised:
        Mixture.of(samples([5]), [1, 1], ["a", "b"])
    assert raised.value.message.endswith(": no sample would be drawn: it has no samples to train on")
    assert raised.value.hint == "leave it out, or hold out fewer rows"


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_contains_every_sample_once(count, fraction, seed):
    samples = [Sample((i,), (i,), f"rows.jsonl, line {i}") for i in range(count)]
    train, held_out = split(samples, fraction, seed)
    assert sorted(s.ids[0] for s in train + held_out) == list(range(count))
    assert train
    assert held_out
    chosen = set(order(count, seed)[: len(held_out)])  # with one sample per row, rows are drawn in the order of samples
    assert [s.ids[0] for s in held_out] == sorted(chosen)
    assert [s.ids[0] for s in train] == [i for i in range(count) if i not in chosen]


@given(st.integers(2, 30_000), st.integers(1, 2))
def test_by_default_a_tenth_of_the_rows_is_held_out_but_at_most_a_thousand(rows, answers):
    samples = [Sample((), (), f"chat.jsonl, line {row}") for row in range(rows) for _ in range(answers)]
    fraction = default_held_out(samples)
    assert (fraction == 0.1) == (rows <= 10_000)
    assert round(rows * fraction) == min(1000, round(rows * 0.1))


@given(st.lists(st.integers(1, 5), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 5))
def test_no_row_is_on_both_sides_of_a_split(answers, fraction, seed):
    samples = [
        Sample((row, turn), (), f"chat.jsonl, line {row}") for row, most in enumerate(answers) for turn in range(most)
    ]
    train, held_out = split(samples, fraction, seed)
    assert not {s.source for s in train} & {s.source for s in held_out}
    assert sorted(s.ids for s in train + held_out) == [s.ids for s in samples]
    for side in (train, held_out):
        assert side == sorted(side, key=lambda sample: sample.ids)
    rows = {s.source for s in held_out}
    assert len(rows) == min(len(answers) - 1, max(1, round(len(answers) * fraction)))


def test_a_row_that_gives_several_samples_is_not_on_both_sides_of_a_split(llama, tmp_path):
    """If the template omits reasoning from all answers but the last, a conversation gives one sample per answer."""
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [
        {"messages": [
            {"role": ("user", "assistant")[turn % 2], "content": f"<think>so</think>row {row} turn {turn}"}
            for turn in range(6)
        ]}
        for row in range(8)
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_data([path], tokenizer, 999)
    assert (len(dataset.samples), dataset.split) == (24, 8)
    for seed in range(5):
        train, held_out = split(dataset.samples, 0.25, seed)
        assert (len(train), len(held_out)) == (18, 6)
        assert not {s.source for s in train} & {s.source for s in held_out}


def test_a_single_row_cannot_be_split_even_if_it_gives_several_samples():
    samples = [Sample((turn,), (turn,), "chat.jsonl, line 1") for turn in range(3)]
    with pytest.raises(DataError, match="a single row cannot be split"):
        split(samples, 0.5, 0)
    assert split(samples, 0, 0) == (samples, [])
