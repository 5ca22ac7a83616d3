"""What is replaced in transformers acts only inside the networks that ask for it, and is put back.

The kernel itself is compared in ``test_gpu_layers``; here the formula takes its place, so that all runs on a CPU.
"""

import pickle
import threading

import pytest
import torch
import transformers
from adapted import load_adapted, logits_and_gradients, plain_in
from transformers import masking_utils
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from adaptkit.training.fast import patches
from adaptkit.training.fast.patches import patch_transformers

OWN, CHECK = modeling_llama.apply_rotary_pos_emb, masking_utils.find_packed_sequence_indices


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernel, which the formula stands in for."""
    seen = []

    def rotated(query, key, cos, sin, back):
        seen.append(back)
        sin = -sin if back else sin
        half = query.shape[-1] // 2
        if back:  # the transposed matrices
            sin = torch.cat((sin[..., half:], sin[..., :half]), -1)

        def one(x):
            turned = torch.cat((-x[..., half:], x[..., :half]), -1)
            return x * cos[:, None] + turned * sin[:, None]

        return one(query), one(key)

    monkeypatch.setattr(patches, "_rotated", rotated)
    monkeypatch.setattr(patches, "has_triton", lambda device_type: True)
    return seen


@pytest.fixture
def patched(made):
    """Return a function that patches transformers for a family's network, until the test ends."""
    opened = []

    def patch(family="llama", dtype=torch.float32):
        model = load_adapted(plain_in(made, family), dtype)
        before = logits_and_gradients(model.network)
        opened.append(patch_transformers(model.network))
        return model, before

    yield patch
    for undo in opened:
        undo.close()
    assert modeling_llama.apply_rotary_pos_emb is OWN
    assert masking_utils.find_packed_sequence_indices is CHECK


def inside(function, *given, **named):
    """Call a function as the attention of a patched network does."""
    return patches._marking(function, "rotary", lambda options: True)(*given, **named)


def inputs(dtype, batch=2, tokens=7, heads=4, key_heads=2, dim=16, angles=1):
    generator = torch.Generator().manual_seed(2)
    query, key = (
        torch.randn(batch, tokens, count, dim, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for count in (heads, key_heads)
    )
    cos, sin = (torch.randn(angles, tokens, dim, generator=generator).to(dtype) for _ in range(2))
    return query, key, cos, sin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mixtral"])
def test_a_patched_network_computes_the_same(family, dtype, patched, calls):
    model, before = patched(family, dtype)
    assert not calls
    for one, two in zip(logits_and_gradients(model.network), before, strict=True):
        torch.testing.assert_close(one, two)
    assert sorted(calls) == [False] * (layers := model.network.config.num_hidden_layers) + [True] * layers


def test_a_network_with_a_different_rotation_is_left_alone(patched, calls):
    model, before = patched("phi")  # rotates only a part of each head, which the kernel does not support
    assert all(map(torch.equal, logits_and_gradients(model.network), before))
    assert not calls


def test_other_networks_of_the_process_are_left_alone(patched, calls):
    patched()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    logits_and_gradients(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=300)))
    assert not calls


def test_the_last_of_several_networks_puts_the_functions_back(made):
    first, second = (patch_transformers(load_adapted(plain_in(made, "llama")).network) for _ in range(2))
    assert modeling_llama.apply_rotary_pos_emb is not OWN
    first.close()
    assert modeling_llama.apply_rotary_pos_emb is not OWN
    second.close()
    assert modeling_llama.apply_rotary_pos_emb is OWN
    assert masking_utils.find_packed_sequence_indices is CHECK


@pytest.mark.parametrize(
    "changed",
    [
        lambda q, k, cos, sin: (q, k[:1].repeat(1, 2, 1, 1)[:, ::2], cos, sin),
        lambda q, k, cos, sin: (q, k, cos[:, :1], sin[:, :1]),
        lambda q, k, cos, sin: (q.contiguous(), k, cos, sin),
        lambda q, k, cos, sin: (q.double(), k.double(), cos, sin),
        lambda q, k, cos, sin: (q, k, cos.bfloat16(), sin),
        lambda q, k, cos, sin: (q, k, cos.clone().requires_grad_(), sin),
    ],
)
def test_unsupported_inputs_use_transformers_function(changed, patched, calls):
    patched()
    function = modeling_llama.apply_rotary_pos_emb
    given = changed(*inputs(torch.float32))
    expected = OWN(*given)
    found = inside(function, *given)
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
def test_inputs_that_transformers_refuses_are_refused(changed, patched, calls):
    """The kernel, which would read out of bounds, is not called."""
    patched()
    with pytest.raises(RuntimeError, match="size"):
        inside(modeling_llama.apply_rotary_pos_emb, *changed(*inputs(torch.float32)))
    assert not calls


def test_heads_of_an_odd_size_use_transformers_function(patched, calls):
    patched()
    function, given = modeling_llama.apply_rotary_pos_emb, inputs(torch.float32, dim=7)
    assert all(map(torch.equal, inside(function, *given), OWN(*given)))
    assert not calls


def test_a_different_position_of_the_head_dimension_uses_transformers_function(patched, calls):
    patched()
    function, (query, key, cos, sin) = modeling_llama.apply_rotary_pos_emb, inputs(torch.float32)
    given = query.transpose(1, 2), key.transpose(1, 2), cos, sin
    for more, named in (((2,), {}), ((), {"unsqueeze_dim": 2})):
        found = inside(function, *given, *more, **named)
        assert all(map(torch.equal, found, OWN(*given, 2)))
    assert not calls


def test_a_nested_attention_does_not_end_the_outer_one(patched, calls):
    patched()
    function, given = modeling_llama.apply_rotary_pos_emb, inputs(torch.float32)
    inside(lambda: (inside(lambda: None), function(*given)))
    assert len(calls) == 1


def test_transformers_function_can_still_be_pickled(patched):
    patched()
    assert pickle.loads(pickle.dumps(modeling_llama.apply_rotary_pos_emb)) is modeling_llama.apply_rotary_pos_emb


def test_functions_with_a_different_formula_are_not_recognized():
    own = modeling_gemma2.apply_rotary_pos_emb
    assert patches._is_formula(own)
    assert not patches._is_formula(lambda q, k, cos, sin: own(q, k, sin, cos))
    assert not patches._is_formula(lambda q, k, cos, sin: [x.float().bfloat16() for x in own(q, k, cos, -sin)])
    assert not patches._is_formula(lambda q, k, position: (q, k))


RESTARTING = torch.tensor([[0, 1, 2, 0, 1]])


def samples_found(*_, **__):
    found = masking_utils.find_packed_sequence_indices(RESTARTING)
    return None if found is None else found.tolist()


def test_the_check_of_positions_is_skipped_only_without_positions_and_in_the_networks_thread(patched):
    patched()
    single, told = patches._marking(samples_found, "single", patches._has_no_positions), []

    def both(**_):
        other = threading.Thread(target=lambda: told.append(samples_found()))
        other.start()
        other.join()
        return samples_found()

    assert single() is None
    assert patches._marking(both, "single", patches._has_no_positions)() is None
    assert single(position_ids=RESTARTING) == samples_found() == told[0] == [[0, 0, 0, 1, 1]]


def test_the_check_is_made_again_after_an_error(patched):
    patched()

    def fails(**_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        patches._marking(fails, "single", patches._has_no_positions)()
    assert samples_found() == [[0, 0, 0, 1, 1]]
