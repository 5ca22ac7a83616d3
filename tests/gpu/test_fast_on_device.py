"""On a GPU, the fast parts agree with transformers, also in checkpointed layers."""

import pytest
import torch
from adapted import load_adapted, packed_in

from adaptkit.training.fast import accelerate
from adaptkit.training.fast.last_products import find_last_products
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

GPU = torch.device("cuda")
ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest relative error, by norm: a GPU may multiply float32 with fewer digits, and both sides round to bfloat16."""


@pytest.fixture(params=["llama", "qwen3", "gemma"])
def folder(request, made):
    return packed_in(made, request.param)


def step(network):
    """Logits, and the gradients of the adapter."""
    torch.manual_seed(3)
    ids = torch.randint(0, 300, (2, 65), generator=torch.Generator().manual_seed(5)).to(GPU)
    logits = network.train()(input_ids=ids, use_cache=False).logits.float()
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in network.parameters() if p.requires_grad)]


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.0), (torch.float32, 0.2), (torch.bfloat16, 0.0)])
def test_a_fast_network_computes_what_transformers_computes(folder, dtype, dropout):
    options = {"dropout": dropout, "device": GPU} | ({"rank_pattern": {"q_proj": 3}} if dtype == torch.float32 else {})
    expected = step(load_adapted(folder, dtype, **options).network)
    model = load_adapted(folder, dtype, **options)
    accelerate(model.network, dtype, GPU, model.output_layer)
    found = step(model.network)
    for one, two in zip(found, expected, strict=True):
        assert float((one - two).norm()) <= ERROR[dtype] * float(two.norm())


@pytest.mark.parametrize("policy", ["layer", "segments:1"])
def test_checkpointed_gradients_equal_those_without_checkpointing(folder, policy):
    found = []
    for how in ("none", policy):
        model = load_adapted(folder, torch.bfloat16, device=GPU)
        assert len(find_last_products(model.network)) == model.network.config.num_hidden_layers
        accelerate(model.network, torch.bfloat16, GPU)
        checkpoint_layers(model.network, choose_checkpointing(model.network, how, list))
        found.append(step(model.network))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_a_network_may_be_made_fast_on_the_host_and_moved_as_with_a_sharded_base(folder):
    expected = step(load_adapted(folder, torch.bfloat16, device=GPU).network)
    model = load_adapted(folder, torch.bfloat16)
    accelerate(model.network, torch.bfloat16, GPU, is_sharded=True)
    assert "narrow_adapters" in dict(model.network.named_buffers())
    model.network.to(GPU)
    found = step(model.network)
    for one, two in zip(found, expected, strict=True):
        assert float((one - two).norm()) <= ERROR[torch.bfloat16] * float(two.norm())
