"""Packed samples do not affect each other, and fit into few rows."""

import pytest
import tiny
import torch
from folders import edit_json
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.data.batches import Batches, collate, pack
from adaptkit.data.encoding import IGNORED, Sample
from adaptkit.errors import UsageError
from adaptkit.training.network.loss import summed_loss
from adaptkit.training.network.model import load_model
from adaptkit.training.network.probing import check_packing

CPU = torch.device("cpu")


def samples(lengths, seed=0):
    """Random tokens; the second half of each carries loss."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, 280, (length,), generator=generator).tolist()
        made.append(Sample(ids, [IGNORED] * (length // 2) + ids[length // 2 :]))
    return made


@given(st.lists(st.integers(1, 40), max_size=80), st.integers(40, 64), st.randoms())
def test_rows_contain_every_sample_once_and_do_not_exceed_the_capacity(lengths, capacity, chance):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    shuffled = lengths[:]
    chance.shuffle(shuffled)
    assert len(pack(shuffled, capacity)) == len(rows)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_each_sample_goes_into_the_fullest_row_that_has_room(lengths):
    """Compare with a simple implementation that looks at every row."""
    expected: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        filled = [(sum(lengths[i] for i in row), n) for n, row in enumerate(expected)]
        fitting = [(full, n) for full, n in filled if full + lengths[sample] <= 40]
        if fitting:
            expected[max(fitting)[1]].append(sample)
        else:
            expected.append([sample])
    found = pack(lengths, 40)
    assert sorted(sum(lengths[i] for i in row) for row in found) == sorted(
        sum(lengths[i] for i in row) for row in expected
    )


@pytest.fixture(scope="module")
def folders(made, llama, gpt2):
    """Mistral's attention has a sliding window, here of four tokens."""
    found = {"llama": llama, "gpt2": gpt2}
    for family in ("qwen3", "mistral"):
        found[family] = tiny.write_family(made / f"packed-{family}", family)
    path = found["mistral"] / "config.json"
    edit_json(path, sliding_window=4)
    return found


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "sdpa"),
        ("qwen3", "eager"),
        ("gpt2", "sdpa"),
        ("mistral", "sdpa"),
        ("mistral", "eager"),
    ],
)
def test_a_packed_sample_has_the_same_logits_as_alone(family, attention, folders):
    model = load_model(folders[family], torch.float32, CPU)
    model.network.set_attn_implementation(attention)
    row = samples([9, 1, 14, 2, 5])
    batch = collate([tuple(row), tuple(samples([3, 11], seed=1))], 2)
    with torch.no_grad():
        packed = model.network(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits[0]
        start = 0
        for sample in row:
            alone = model.network(input_ids=torch.tensor([sample.ids]), use_cache=False).logits[0]
            torch.testing.assert_close(packed[start : start + len(sample.ids)], alone, rtol=0, atol=1e-5)
            start += len(sample.ids)
    check_packing(model.network)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_of_packed_samples_is_the_sum_of_their_losses_alone(family, folders):
    model = load_model(folders[family], torch.float32, CPU)
    some = samples([9, 1, 14, 2, 5, 3, 11])
    batches = Batches(some, batch_size=2, pack_length=16)
    rows = [batch for step in range(batches.steps_per_epoch) for batch in batches.micro_batches(step)]
    assert any(batch.positions is not None for batch in rows)
    assert sum(len(batch.ids) for batch in rows) < len(some)
    packed = sum(float(summed_loss(model, batch)) for batch in rows)
    alone = sum(float(summed_loss(model, collate([(sample,)], 2))) for sample in some if sample.answer_tokens)
    assert packed == pytest.approx(alone, rel=1e-5)


def test_the_first_token_of_a_packed_sample_carries_no_loss():
    plain = [Sample((5, 6), (5, 6)), Sample((7, 8, 9), (7, 8, 9))]
    batch = collate([tuple(plain)], 0)
    assert batch.labels.tolist() == [[IGNORED, 6, IGNORED, 8, 9]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert int((batch.labels != IGNORED).sum()) == sum(sample.answer_tokens for sample in plain)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 4}),  # counts positions itself
        ("bloom", {"n_layer": 2, "n_head": 4}),  # distances instead of positions
        ("mamba", {"state_size": 4}),  # a state instead of attention
    ],
)
def test_architectures_that_ignore_position_ids_are_refused(family, values):
    from transformers import AutoConfig, AutoModelForCausalLM

    values |= {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values)).eval()
    with pytest.raises(UsageError, match="does not keep packed samples apart"):
        check_packing(network)


def test_a_model_in_which_packed_samples_attend_to_each_other_is_refused(llama):
    """Given an attention mask of ones, transformers ignores the positions."""
    model = load_model(llama, torch.float32, CPU)
    forward = model.network.forward
    model.network.forward = lambda input_ids, **kwargs: forward(
        input_ids, attention_mask=torch.ones_like(input_ids), **kwargs
    )
    with pytest.raises(UsageError, match="LlamaForCausalLM does not keep packed samples apart"):
        check_packing(model.network)
