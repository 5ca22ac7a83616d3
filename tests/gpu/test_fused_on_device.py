"""On a GPU, fused norms, gates and rotary embeddings agree with transformers, also in checkpointed layers."""

import pytest
import torch
from adapted import load_adapted, packed_in

from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network import rotary
from adaptkit.training.network.fused import fuse_layers, fused_gates
from adaptkit.training.network.joined_gpu import join_on_gpu
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.unread import mark_unread
from adaptkit.training.preparation import make_fast
from adaptkit.training.triton_needs import what_triton_lacks

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
    ids = torch.randint(0, 300, (2, 65), generator=torch.Generator().manual_seed(5)).to(GPU)
    logits = network.train()(input_ids=ids, use_cache=False).logits.float()
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in network.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dtype", ERROR)
def test_fused_layers_compute_what_transformers_computes(folder, dtype, monkeypatch):
    expected = step(load_adapted(folder, dtype, device=GPU).network)
    model, rotations = load_adapted(folder, dtype, device=GPU), []
    apply = rotary._Rotary.apply
    monkeypatch.setattr(rotary._Rotary, "apply", lambda *args: rotations.append(args) or apply(*args))
    fuse_layers(model.network, on_gpu=True)
    join_on_gpu(model.network)
    rotations.clear()
    for one, two in zip(step(model.network), expected, strict=True):
        assert float((one - two).norm()) <= ERROR[dtype] * float(two.norm())
    assert len(rotations) == (0 if what_triton_lacks() else model.network.config.num_hidden_layers)


@pytest.mark.parametrize("policy", ["layer", "segments:1"])
def test_checkpointed_gradients_equal_those_without_checkpointing(folder, policy):
    found = []
    for how in ("none", policy):
        model = load_adapted(folder, torch.bfloat16, device=GPU)
        fuse_layers(model.network, on_gpu=True)
        join_on_gpu(model.network)
        mark_unread(model.network)
        checkpoint_layers(model.network, choose_checkpointing(model.network, how, list))
        found.append(step(model.network))
    unread = [part for part in model.network.modules() if isinstance(part, LoraLinear) and part.is_unread]
    assert len(unread) == model.network.config.num_hidden_layers
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_layers_may_be_fused_after_they_are_checkpointed_as_with_a_sharded_base(folder):
    """Sharding moves them to the device, and comes after checkpointing; see ``training.preparation.build``."""
    found = []
    for is_fused in (False, True):
        model = load_adapted(folder, torch.bfloat16, device=GPU)
        mark_unread(model.network)
        checkpoint_layers(model.network, choose_checkpointing(model.network, "layer", list))
        if is_fused:
            make_fast(model, is_sharded=True)
            assert "narrow_adapters" in dict(model.network.named_buffers())
            layers = model.network.model.layers
            assert all("forward" in vars(layer.self_attn) for layer in layers)
            known = "gemma" not in str(folder)  # whose gates and norms are of other kinds
            assert len(fused_gates(model.network)) == (len(layers) if known and not what_triton_lacks() else 0)
            assert all(("forward" in vars(layer.input_layernorm)) == known for layer in layers)
        found.append(step(model.network))
    for one, two in zip(*found, strict=True):
        assert float((one - two).norm()) <= ERROR[torch.bfloat16] * float(two.norm())
