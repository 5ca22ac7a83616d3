"""Recomputed activations keep their bits, are computed once per backward pass, and are freed after the last reader."""

import weakref

import pytest
import torch
from adapted import load_adapted, logits_and_gradients, plain_in

from adaptkit.models import recompute
from adaptkit.models.recompute import Recipe, source_of
from adaptkit.training.network import dora, joined, linear
from adaptkit.training.network.fused import fuse_layers
from adaptkit.training.network.joined import join_layers


def model_of(made, dtype, uses_dora=False, joins=False):
    model = load_adapted(plain_in(made, "llama"), dtype, dora=uses_dora)
    fuse_layers(model.network)
    if joins:
        join_layers(model.network)
    return model


KINDS = [(False, False), (True, False), (False, True)]
"""Pairs: whether adapters are DoRA, and whether layers are joined."""


@pytest.mark.parametrize(("uses_dora", "joins"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_bit_identical_to_those_of_a_model_that_saves_all_activations(
    dtype, uses_dora, joins, made, monkeypatch
):
    model = model_of(made, dtype, uses_dora, joins)
    found = logits_and_gradients(model.network)
    for module in (linear, dora, joined):
        monkeypatch.setattr(module, "source_of", lambda x, is_next=False: (lambda kept: kept, (x,)))
    for one, two in zip(found, logits_and_gradients(model.network), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("uses_dora", "joins"), KINDS)
def test_outputs_of_norms_and_gates_are_not_saved(uses_dora, joins, made, monkeypatch):
    model = model_of(made, torch.float32, uses_dora, joins)
    outputs, attach = [], Recipe.attach

    def note(recipe, result, *inputs):
        outputs.append(weakref.ref(result.untyped_storage()))
        return attach(recipe, result, *inputs)

    monkeypatch.setattr(Recipe, "attach", note)
    hidden = model.network.model(input_ids=torch.arange(8)[None], use_cache=False).last_hidden_state
    assert len(outputs) == 7  # two norms and a gate in each of two layers, and the final norm, whose output is returned
    assert [ref() is None for ref in outputs] == [True] * 6 + [False]
    assert hidden.requires_grad


def test_a_tensor_is_recomputed_once_for_all_its_readers_and_then_dropped(made, monkeypatch):
    model = model_of(made, torch.float32)
    calls, held = [], []
    call, forget = Recipe.__call__, Recipe.forget

    def note(recipe, *inputs):
        calls.append((id(recipe), recipe._made is None))
        held.append(recipe)
        return call(recipe, *inputs)

    monkeypatch.setattr(Recipe, "__call__", note)
    forgotten = []
    monkeypatch.setattr(Recipe, "forget", lambda recipe: (forgotten.append(id(recipe)), forget(recipe)))
    logits_and_gradients(model.network)
    assert len(calls) == 2 * (3 + 2 + 1)  # q, k and v; gate and up; down
    assert sum(is_first for _, is_first in calls) == 2 * 3
    assert all(recipe._made is None for recipe in held)
    assert len({id(recipe) for recipe in held} - set(forgotten)) <= 1  # the first norm's, whose input needs no gradient


def test_a_recomputed_tensor_is_cached_until_its_last_reader():
    x, made = torch.ones(3), []
    y = Recipe(lambda x: made.append(x) or -x).attach(-x, x)
    readers = [source_of(y) for _ in range(3)]
    results = [make(*kept) for make, kept in readers[:2]]
    recipe = readers[0][0]
    assert results[0] is results[1] is recipe._made
    assert readers[2][0](*readers[2][1]) is results[0]
    assert (len(made), recipe._made) == (1, None)
    assert torch.equal(recipe(x), y)  # a further call recomputes it


def test_the_tensor_itself_is_cached_for_a_reader_that_runs_next():
    x, made = torch.ones(3), []
    y = Recipe(lambda x: made.append(x) or -x).attach(-x, x)
    make, kept = source_of(y, is_next=True)
    assert make(*kept).data_ptr() == y.data_ptr()
    assert (made, make._made) == ([], None)


def test_a_tensor_is_saved_itself_if_it_or_its_input_was_modified():
    x = torch.ones(3)
    y = Recipe(torch.neg).attach(-x, x)
    make, kept = source_of(y)
    assert kept[0] is x
    assert torch.equal(make(*kept), y)
    changes = (lambda x, y: y.add_(1), lambda x, y: x.add_(1))
    for change in changes:
        y = Recipe(torch.neg).attach(-x, x)
        change(x, y)
        make, kept = source_of(y)
        assert make(*kept) is y


def test_no_recipe_is_attached_if_no_gradients_are_recorded(made):
    model = model_of(made, torch.float32)
    seen = []
    model.linears["model.layers.0.mlp.down_proj"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.network(input_ids=torch.arange(8)[None], use_cache=False)
    assert not hasattr(seen[0], recompute._ATTRIBUTE)
