"""Every sample occurs once per epoch with any batch size, order and number of processes."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.data.batches import Batches, collate
from adaptkit.data.encoding import IGNORED, Sample
from adaptkit.data.tokenizer_files import load_tokenizer

PAD = 0
plans = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "micro_batch_size": st.none() | st.integers(1, 4),
        "seed": st.integers(0, 3),
        "group_by_length": st.booleans(),
    }
)
counts = st.integers(1, 60)


def samples(count, seed=0):
    """Make samples of 2 to 30 tokens; all tokens of sample n are n + 1."""
    lengths = torch.randint(2, 31, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Sample((n + 1,) * length, (IGNORED,) + (n + 1,) * (length - 1)) for n, length in enumerate(lengths)]


def numbers(batches):
    """Return the samples in the rows of batches, in order, as the first token of each; rows of padding are left out."""
    return [row[0] for batch in batches for row in batch.ids.tolist() if row[0] != PAD]


@given(counts, plans)
def test_an_epoch_contains_every_sample_once_in_steps_of_nearly_equal_size(count, plan):
    batches = Batches(samples(count), **plan)
    assert batches.steps_per_epoch == math.ceil(count / plan["batch_size"])
    for epoch in range(3):
        steps = [
            numbers(batches.micro_batches(epoch * batches.steps_per_epoch + n)) for n in range(batches.steps_per_epoch)
        ]
        assert sorted(n for step in steps for n in step) == list(range(1, count + 1))
        sizes = {len(step) for step in steps}
        assert max(sizes) <= plan["batch_size"]
        assert max(sizes) - min(sizes) <= 1


@given(counts, plans, st.integers(1, 5), st.integers(0, 99))
def test_any_number_of_processes_divide_the_samples_of_a_step(count, plan, world, step):
    batches = Batches(samples(count), **plan)
    whole = batches.micro_batches(step)
    parts = [batches.micro_batches(step, rank, world) for rank in range(world)]
    assert Counter(numbers(whole)) == Counter(n for part in parts for n in numbers(part))
    assert len({len(part) for part in parts}) == 1
    limit = plan["micro_batch_size"] or plan["batch_size"]
    assert all(len(batch.ids) <= limit for part in parts for batch in part)
    labelled = sum(int((batch.labels != IGNORED).sum()) for part in parts for batch in part)
    assert labelled == sum(sample.answer_tokens for row in batches.rows(step) for sample in row)
    real = [batch for part in parts for batch in part if (batch.ids != PAD).any()]
    assert sum(int(batch.mask.sum()) for batch in real) == batches.tokens(step)


@given(counts, plans, st.integers(1, 5))
def test_the_largest_batch_has_as_many_rows_as_one_process_gets(count, plan, world):
    """The largest batch determines checkpointing and the predicted memory."""
    batches = Batches(samples(count), **plan)
    parts = [batches.micro_batches(n, 0, world) for n in range(batches.steps_per_epoch)]
    assert batches.largest(world)[0] == max(len(batch.ids) for part in parts for batch in part)


@given(counts, plans, st.lists(st.integers(0, 99), min_size=1, max_size=5))
def test_a_step_does_not_depend_on_steps_requested_before(count, plan, before):
    asked, fresh = Batches(samples(count), **plan), Batches(samples(count), **plan)
    for step in before:
        asked.micro_batches(step)
    for first, second in zip(asked.micro_batches(before[0]), fresh.micro_batches(before[0]), strict=True):
        assert torch.equal(first.ids, second.ids)
        assert torch.equal(first.labels, second.labels)


@pytest.mark.parametrize("grouped", [False, True])
def test_epochs_and_seeds_differ_in_order(grouped):
    batches = Batches(samples(40), batch_size=4, group_by_length=grouped)
    first, second = (
        [numbers(batches.micro_batches(epoch * batches.steps_per_epoch + n)) for n in range(10)] for epoch in (0, 1)
    )
    other = Batches(samples(40), batch_size=4, group_by_length=grouped, seed=1)
    assert first != second
    assert first != [numbers(other.micro_batches(n)) for n in range(10)]


def test_grouping_pads_less_and_does_not_sort_the_epoch():
    def padding(**options):
        batches = Batches(samples(400), batch_size=8, **options)
        all_of_them = [batch for step in range(batches.steps_per_epoch) for batch in batches.micro_batches(step)]
        return sum(int((batch.mask == 0).sum()) for batch in all_of_them), [b.ids.shape[1] for b in all_of_them]

    (grouped, lengths), (random, _) = padding(group_by_length=True), padding()
    assert grouped < 0.1 * random
    assert lengths != sorted(lengths)


def test_padding_is_masked_even_if_its_id_is_the_end_token(llama):
    tokenizer = load_tokenizer(llama)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    short, long = Sample((5, 6, 2), (-100, 6, 2)), Sample((5, 6, 7, 8, 2), (-100, -100, 7, 8, 2))
    batch = collate([(short,), (long,)], tokenizer.pad_token_id)
    assert batch.mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, 6, 2, -100, -100], [-100, -100, 7, 8, 2]]
    assert batch.positions is None
