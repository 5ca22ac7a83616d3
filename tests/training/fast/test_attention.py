"""Attention agrees with its formula in float64, and models that use it agree with models that use torch's."""

import pytest
import tiny
import torch
import transformers
from adapted import plain_in
from attention_formula import formula

from adaptkit.training.fast import attention, attention_spans
from adaptkit.training.fast.attention import attend, use_own_attention
from adaptkit.training.fast.attention_spans import Spans, causal_spans, mask_spans
from adaptkit.training.network.model import load_model


def seen_by(runs, keys):
    """Return spans as a mask: (batch, 1, queries, keys)."""
    place = torch.arange(keys)
    return ((place >= runs.first[..., None]) & (place < runs.last[..., None]))[:, None]


def random_spans(batch, queries, keys, generator):
    first = torch.randint(0, keys, (batch, queries), generator=generator, dtype=torch.int32)
    last = first + torch.randint(0, keys, (batch, queries), generator=generator, dtype=torch.int32)
    return Spans(first, last.clamp(max=keys))


def window(queries):
    last = torch.arange(1, queries + 1, dtype=torch.int32).expand(2, -1)
    return Spans((last - 7).clamp(min=0), last)


CASES = {
    "causal": lambda n, g: causal_spans(2, n),
    "window": lambda n, g: window(n),
    "any runs, empty ones too": lambda n, g: random_spans(2, n, n, g),
}


@pytest.mark.parametrize(("heads", "key_heads", "dim", "value_dim"), [(4, 4, 16, 16), (6, 2, 8, 8), (3, 1, 32, 24)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 9, 40])
def test_result_and_gradients_agree_with_the_formula(case, length, heads, key_heads, dim, value_dim, monkeypatch):
    monkeypatch.setattr(attention_spans, "ATTENTION_ROWS", 16)
    monkeypatch.setattr(attention_spans, "ATTENTION_SCORES", 700)
    generator = torch.Generator().manual_seed(length)
    runs = CASES[case](length, generator)
    sizes = ((2, heads, length, dim), (2, key_heads, length, dim), (2, key_heads, length, value_dim))
    inputs = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    weights = torch.randn((2, length, heads, value_dim), generator=generator)
    found = attend(*inputs, 0.3, runs)
    wanted = formula(*doubles, 0.3, seen_by(runs, length))
    torch.testing.assert_close(found, wanted.float(), rtol=2e-6, atol=2e-6)
    gradients = torch.autograd.grad(found, inputs, weights)
    for one, other in zip(gradients, torch.autograd.grad(wanted, doubles, weights.double()), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_infinity_and_overflow_in_an_input_give_nan(side, wrong, dtype):
    """Otherwise the row's maximum and the clamped exponential would turn them into a finite number."""
    inputs = [torch.ones(1, 2, 9, 16, dtype=dtype) for _ in range(3)]
    inputs[side][0, 1, 5, 3] = wrong
    inputs[1 - side][0, 1] *= 2
    found = attend(*inputs, 2.0, causal_spans(1, 9))
    bad = slice(5, 6) if side == 0 else slice(5, 9)
    assert found[0, bad, 1].isnan().all()
    assert found[0, :5].isfinite().all()
    assert found[0, :, 0].isfinite().all()


def test_tensors_on_a_different_device_use_torchs_attention(llama):
    """A model that is loaded on the host and then sharded across GPUs keeps the name of this attention."""
    model = load_model(llama, torch.bfloat16, torch.device("cpu"))
    use_own_attention(model.network)
    assert model.network.config._attn_implementation == attention.NAME
    layer = model.network.model.layers[0].self_attn
    inputs = [torch.empty(1, heads, 9, 16, device="meta") for heads in (4, 2, 2)]
    result, _ = attention._forward(layer, *inputs, None, scaling=0.25)
    assert (result.shape, result.device.type) == ((1, 9, 4, 16), "meta")


def test_bfloat16_is_about_as_accurate_as_transformers_eager_attention():
    """Compare relative errors against float64; eager attention rounds at the same places."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 6, 100, 32), (1, 2, 100, 32), (1, 2, 100, 32))
    inputs = [torch.randn(size, generator=generator).bfloat16().requires_grad_() for size in sizes]
    weights = torch.randn((1, 100, 6, 32), generator=generator).bfloat16()
    runs = causal_spans(1, 100)
    mask = seen_by(runs, 100)

    def eager(query, key, value):
        key, value = (side.repeat_interleave(3, 1) for side in (key, value))
        scores = query @ key.transpose(2, 3) * 0.2 + torch.where(mask, 0.0, -1e30).to(query.dtype)
        return (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2)

    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = torch.autograd.grad(formula(*doubles, 0.2, mask), doubles, weights.double())

    def errors(result):
        found = torch.autograd.grad(result, inputs, weights)
        return [float((one - two).norm() / two.norm()) for one, two in zip(found, exact, strict=True)]

    for own, theirs in zip(errors(attend(*inputs, 0.2, runs)), errors(eager(*inputs)), strict=True):
        assert own < 1.3 * theirs < 0.02


def test_masks_are_converted_to_spans_unless_a_query_attends_to_several_runs():
    generator = torch.Generator().manual_seed(2)
    runs = random_spans(2, 12, 12, generator)
    mask = seen_by(runs, 12)
    assert torch.equal(seen_by(mask_spans(mask), 12), mask)
    assert mask_spans(mask) is mask_spans(mask)
    mask[0, 0, 5] = torch.tensor([True, False] * 6)
    assert mask_spans(mask) is None
    other = seen_by(causal_spans(1, 12), 12)
    assert torch.equal(seen_by(mask_spans(other), 12), other)
    with torch.inference_mode():
        known = seen_by(runs, 12)
        assert torch.equal(seen_by(mask_spans(known), 12), known)
        known[0, 0, 5] = torch.tensor([True, False] * 6)
        assert mask_spans(known) is None, "such a tensor has no version"


FAMILIES = ("llama", "mistral", "qwen3", "gpt2", "gemma")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["padded", "packed", "alone"])
def test_logits_and_gradients_of_a_model_equal_those_with_torchs_attention(family, kind, made):
    folder = plain_in(made, family)
    extra = {"sliding_window": 9} if family == "mistral" else {}
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if kind == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][1, 15:] = 0
    if kind == "packed":
        inputs["position_ids"] = torch.tensor([[*range(10), *range(14)], [*range(3), *range(21)]])
    found = {}
    for own in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", **extra
        ).eval()
        if own:
            use_own_attention(model)
            assert model.config._attn_implementation == attention.NAME
        logits = model(**inputs, use_cache=False).logits
        if kind == "padded":
            logits = logits[inputs["attention_mask"].bool()]
        logits.square().mean().backward()
        found[own] = [logits, *(p.grad for p in model.parameters())]
    for one, two in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.detach().abs().max()))


def test_generated_tokens_are_those_with_torchs_attention(llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="sdpa")
    ids = torch.arange(2, 12)[None]
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    use_own_attention(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)


def test_alternating_masks_get_their_own_spans():
    masks = [seen_by(window(12), 12), seen_by(causal_spans(2, 12), 12)]
    for _ in range(2):
        for mask in masks:
            assert torch.equal(seen_by(mask_spans(mask), 12), mask)
    assert mask_spans(masks[0]) is mask_spans(masks[0])


def test_the_same_spans_work_for_different_numbers_of_heads():
    generator = torch.Generator().manual_seed(3)
    for heads, key_heads in ((4, 2), (6, 2), (6, 6), (4, 2)):  # causal_spans returns the same object each time
        sizes = ((1, heads, 9, 8), (1, key_heads, 9, 8), (1, key_heads, 9, 8))
        inputs = [torch.randn(size, generator=generator) for size in sizes]
        wanted = formula(*(side.double() for side in inputs), 0.3, seen_by(causal_spans(1, 9), 9))
        torch.testing.assert_close(attend(*inputs, 0.3, causal_spans(1, 9)), wanted.float(), rtol=2e-6, atol=2e-6)


def test_one_mask_may_apply_to_all_rows_of_a_batch(llama):
    model = load_model(llama, torch.float32, torch.device("cpu"))
    ids = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    expected = model.network(input_ids=ids, use_cache=False).logits
    use_own_attention(model.network)
    found = model.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_a_model_whose_masking_depends_on_the_name_sdpa_keeps_that_attention(name, tmp_path, monkeypatch):
    values = {
        "index_topk": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    }  # fmt: skip
    monkeypatch.setitem(tiny.ARCHITECTURES, name, values)
    folder, ids = tiny.write_architecture(tmp_path / name, name), torch.arange(3, 27)[None]
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = load_model(folder, torch.float32, torch.device("cpu")).network.eval()
    use_own_attention(found)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, plain(ids).logits)


def test_a_mask_with_a_gradient_gives_the_bits_of_one_without():
    """A layer may compute its mask itself; if it is checkpointed, its first forward pass records no gradients."""
    generator = torch.Generator().manual_seed(7)
    query, key, value = torch.randn(3, 2, 4, 40, 16, generator=generator)
    made = torch.randn(2, 4, 40, 40, generator=generator)
    module = torch.nn.Module()
    expected, _ = attention._forward(module, query, key, value, made, scaling=0.25)
    found, _ = attention._forward(module, query, key, value, made.requires_grad_(), scaling=0.25)
    assert torch.equal(found, expected)
    assert found.requires_grad
