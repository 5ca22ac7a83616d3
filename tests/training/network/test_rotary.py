"""The fused rotary embedding has the bits of transformers' function and gradient; only fused networks use it."""

import pickle

import pytest
import torch
import transformers
from adapted import load_adapted, logits_and_gradients, plain_in
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from adaptkit.training.network import rotary
from adaptkit.training.network.rotary import fuse_rotary

TYPES = [torch.bfloat16, torch.float32]


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernel."""
    seen, rotate = [], rotary.rotate
    monkeypatch.setattr(rotary, "rotate", lambda *args: (seen.append(args), rotate(*args)))
    return seen


def inputs(dtype, batch=2, tokens=7, heads=4, key_heads=2, dim=16, angles=1):
    generator = torch.Generator().manual_seed(2)
    query, key = (
        torch.randn(batch, tokens, count, dim, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for count in (heads, key_heads)
    )
    cos, sin = (torch.randn(angles, tokens, dim, generator=generator).to(dtype) for _ in range(2))
    return query, key, cos, sin


def both_ways(function, query, key, cos, sin):
    rotated = function(query, key, cos, sin)
    changes = [torch.randn(side.shape, generator=torch.Generator().manual_seed(4)).to(side.dtype) for side in rotated]
    return [*rotated, *torch.autograd.grad(rotated, (query, key), changes)]


@pytest.mark.parametrize("angles", [1, 2])
@pytest.mark.parametrize("dtype", TYPES)
def test_results_and_gradients_have_the_bits_of_transformers(dtype, angles):
    given = inputs(dtype, angles=angles)
    own = getattr(modeling_llama.apply_rotary_pos_emb, "__wrapped__", modeling_llama.apply_rotary_pos_emb)
    expected, found = both_ways(own, *given), both_ways(rotary._Rotary.apply, *given)
    assert all(map(torch.equal, found, expected))
    assert all(side.abs().sum() > 0 for side in expected)


def adapted(made, family, dtype):
    return load_adapted(plain_in(made, family), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mixtral"])
def test_a_fused_network_computes_the_same_bits(family, dtype, made, calls):
    model = adapted(made, family, dtype)
    before = logits_and_gradients(model.network)
    assert not calls
    fuse_rotary(model.network)
    layers = model.network.config.num_hidden_layers
    assert all(map(torch.equal, logits_and_gradients(model.network), before))
    assert len(calls) == 4 * layers, "queries and keys, forward and back"


def test_a_network_with_a_different_rotation_is_left_alone(made, calls):
    model = adapted(made, "phi", torch.float32)  # rotates only a part of each head, which the kernel does not support
    before = logits_and_gradients(model.network)
    fuse_rotary(model.network)
    assert all(map(torch.equal, logits_and_gradients(model.network), before))
    assert not calls


def test_other_networks_of_the_process_are_left_alone(made, calls):
    fuse_rotary(adapted(made, "llama", torch.float32).network)
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=300
        )
    )
    logits_and_gradients(other)
    assert not calls


@pytest.mark.parametrize(
    "changed",
    [
        lambda q, k, cos, sin: (q[:, :2], k, cos, sin),
        lambda q, k, cos, sin: (q, k[:1].repeat(1, 2, 1, 1)[:, ::2], cos, sin),
        lambda q, k, cos, sin: (q, k, cos[:, :1], sin[:, :1]),
        lambda q, k, cos, sin: (q.contiguous(), k, cos, sin),
        lambda q, k, cos, sin: (q.double(), k.double(), cos, sin),
        lambda q, k, cos, sin: (q, k, cos.bfloat16(), sin),
        lambda q, k, cos, sin: (q, k, cos.clone().requires_grad_(), sin),
    ],
)
def test_unsupported_inputs_use_transformers_function(changed, made, calls):
    fuse_rotary(adapted(made, "llama", torch.float32).network)
    function = modeling_llama.apply_rotary_pos_emb
    given = changed(*inputs(torch.float32))
    expected = function.__wrapped__(*given)
    found = rotary._mark_caller(function)(*given)
    assert all(map(torch.equal, found, expected))
    assert not calls


@pytest.mark.parametrize(
    "changed",
    [
        lambda q, k, cos, sin: (q, k.repeat(1, 1, 90, 1).transpose(1, 2).contiguous().transpose(1, 2), cos, sin),
        lambda q, k, cos, sin: (q, k, cos[..., :8], sin[..., :8]),
        lambda q, k, cos, sin: (q, k, cos, sin[..., :8]),
    ],
)
def test_inputs_that_transformers_refuses_are_refused(changed, made, calls):
    """The kernel, which would read out of bounds, is not called."""
    fuse_rotary(adapted(made, "llama", torch.float32).network)
    with pytest.raises(RuntimeError, match="size"):
        rotary._mark_caller(modeling_llama.apply_rotary_pos_emb)(*changed(*inputs(torch.float32)))
    assert not calls


def test_heads_of_an_odd_size_use_transformers_function(made, calls):
    fuse_rotary(adapted(made, "llama", torch.float32).network)
    function, given = modeling_llama.apply_rotary_pos_emb, inputs(torch.float32, dim=7)
    assert all(map(torch.equal, rotary._mark_caller(function)(*given), function.__wrapped__(*given)))
    assert not calls


def test_a_different_position_of_the_head_dimension_uses_transformers_function(made, calls):
    fuse_rotary(adapted(made, "llama", torch.float32).network)
    function, (query, key, cos, sin) = modeling_llama.apply_rotary_pos_emb, inputs(torch.float32)
    given = query.transpose(1, 2), key.transpose(1, 2), cos, sin
    for more, named in (((2,), {}), ((), {"unsqueeze_dim": 2})):
        found = rotary._mark_caller(function)(*given, *more, **named)
        assert all(map(torch.equal, found, function.__wrapped__(*given, 2)))
    assert not calls


def test_a_nested_attention_does_not_end_the_outer_one(made, calls):
    fuse_rotary(adapted(made, "llama", torch.float32).network)
    function, given = modeling_llama.apply_rotary_pos_emb, inputs(torch.float32)
    rotary._mark_caller(lambda: (rotary._mark_caller(lambda: None)(), function(*given)))()
    assert len(calls) == 2


def test_transformers_function_can_still_be_pickled(made):
    fuse_rotary(adapted(made, "llama", torch.float32).network)
    assert pickle.loads(pickle.dumps(modeling_llama.apply_rotary_pos_emb)) is modeling_llama.apply_rotary_pos_emb


def test_angles_are_not_copied_for_every_layer(made, monkeypatch):
    model, kept = adapted(made, "llama", torch.float32), set()
    fuse_rotary(model.network)
    forward = rotary._Rotary.forward

    def watched(ctx, query, key, cos, sin):
        found = forward(ctx, query, key, cos, sin)
        kept.update(tensor.data_ptr() for tensor in ctx.to_save)
        return found

    monkeypatch.setattr(rotary._Rotary, "forward", staticmethod(watched))
    model.network(input_ids=torch.arange(51).reshape(3, 17), use_cache=False)
    assert len(kept) == 2, "cosine and sine"


def test_functions_with_a_different_formula_are_not_recognized():
    own = modeling_gemma2.apply_rotary_pos_emb
    assert rotary._is_formula(own)
    assert not rotary._is_formula(lambda q, k, cos, sin: own(q, k, sin, cos))
    assert not rotary._is_formula(lambda q, k, cos, sin: [x.float().bfloat16() for x in own(q, k, cos, -sin)])
    assert not rotary._is_formula(lambda q, k, position: (q, k))
