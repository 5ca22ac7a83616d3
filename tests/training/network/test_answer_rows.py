"""The last MLP computes only positions with loss: the same loss and gradients, and nothing else changes."""

from contextlib import nullcontext

import pytest
import tiny
import torch
from adapted import load_adapted, packed_in

from adaptkit.data.batches import Batch, collate
from adaptkit.data.encoding import IGNORED, Sample
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network.answer_rows import AnswerRows
from adaptkit.training.network.fused import fuse_layers, fused_gates
from adaptkit.training.network.joined import join_layers
from adaptkit.training.network.loss import summed_loss
from adaptkit.training.network.unread import mark_unread

IDS = torch.arange(3, 45).view(2, 21)


def batch_of(*answers):
    """Two samples whose labels, one later than the positions that carry their loss, begin at the given places."""
    labels = IDS.clone()
    for row, first in enumerate(answers):
        labels[row, :first] = IGNORED
    return Batch(IDS, labels, torch.ones_like(IDS))


def ready(made, family, **options):
    model = load_adapted(packed_in(made, family), **options)
    fuse_layers(model.network)
    join_layers(model.network)
    return model


def counted(model):
    """Return a list that gets the number of rows of each call of every gate's first linear layer."""
    found = []
    for name, module in model.network.named_modules():
        if name.endswith("gate_proj"):
            module.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[:-1].numel()))
    return found


def loss_and_gradients(model, batch, rows=None):
    torch.manual_seed(3)
    model.network.train().zero_grad()
    with nullcontext() if rows is None else rows.only(batch):
        loss = summed_loss(model, batch)
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.network.parameters() if p.requires_grad)]


def check_against_all_positions(model, batch, computed):
    """Check loss, gradients and the number of positions of each MLP; return what to compare a later pass with."""
    expected = loss_and_gradients(model, batch)
    rows = AnswerRows(model)
    sizes = counted(model)
    found = loss_and_gradients(model, batch, rows)
    assert sizes == computed
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))
    sizes.clear()
    return sizes, expected


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "qwen2_moe"])
def test_loss_and_gradients_are_those_of_all_positions(family, made):
    model, batch = ready(made, family), batch_of(15, 9)
    sizes, expected = check_against_all_positions(model, batch, [42, 6 + 12])
    again = loss_and_gradients(model, batch)  # after the block: all positions, as evaluation needs them
    assert sizes == [42, 42]
    assert all(map(torch.equal, again, expected))


@pytest.mark.parametrize("policy", ["layer", "sqrt", "segments:1"])
def test_gradients_with_checkpointing_have_the_same_bits(policy, made):
    batch = batch_of(15, 9)
    plain = ready(made, "llama", dropout=0.2)
    expected = loss_and_gradients(plain, batch, AnswerRows(plain))
    model = ready(made, "llama", dropout=0.2)
    mark_unread(model.network)
    checkpoint_layers(model.network, choose_checkpointing(model.network, policy, (2, 21)))
    rows = AnswerRows(model)
    sizes = counted(model)
    found = loss_and_gradients(model, batch, rows)
    assert all(map(torch.equal, found, expected))
    assert set(sizes) == {42, 18}


@pytest.mark.parametrize("answers", [(1, 1), (21, 21), (2, 2)])
def test_all_positions_are_computed_where_most_or_none_carry_loss(answers, made):
    model = ready(made, "llama")
    rows, sizes = AnswerRows(model), counted(model)
    loss_and_gradients(model, batch_of(*answers), rows)
    assert sizes == [42, 42]


@pytest.mark.parametrize("family", ["gemma", "phi", "mixtral", "gpt2"])
def test_architectures_without_such_an_mlp_are_left_alone(family, made):
    model = ready(made, family)
    before = [module.forward for module in model.network.modules()]
    AnswerRows(model)
    assert [module.forward for module in model.network.modules()] == before


def test_a_gate_in_an_earlier_layer_is_left_alone(made, monkeypatch):
    """In this mixture only the first layer has an MLP; the others have experts."""
    values = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    monkeypatch.setitem(tiny.ARCHITECTURES, "qwen3_moe", values)
    model = load_adapted(tiny.write_architecture(made / "dense-first", "qwen3_moe"))
    fuse_layers(model.network)
    assert [module is model.network.model.layers[0].mlp for module in fused_gates(model.network)] == [True]
    before = model.network.model.layers[0].mlp.forward
    AnswerRows(model)
    assert model.network.model.layers[0].mlp.forward is before


def test_positions_of_packed_samples(made):
    model = ready(made, "llama")
    samples = [tuple(Sample(tuple(range(3, 3 + n)), (IGNORED,) * 4 + tuple(range(7, 3 + n))) for n in (9, 7))]
    check_against_all_positions(model, collate(samples, 0), [16, 5 + 3])


def test_an_mlp_whose_result_reaches_other_positions_is_left_alone(made):
    model = ready(made, "llama")
    layers = model.network.model.layers
    last, norm = layers[-1], model.network.model.norm
    shifted = norm.forward
    norm.forward = lambda x: shifted(x + x.roll(1, 1))  # each position sees the one before
    before = last.mlp.forward
    AnswerRows(model)
    assert last.mlp.forward is before
    norm.forward = shifted
    AnswerRows(model)
    assert last.mlp.forward is not before
    assert type(layers[0].mlp.forward) is type(before)


def test_the_probe_changes_no_state(made):
    model = ready(made, "llama", dropout=0.2)
    model.network.eval()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    AnswerRows(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.network.training
    assert not model.network.model.layers[-1].mlp._forward_hooks
