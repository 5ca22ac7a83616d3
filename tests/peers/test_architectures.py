"""Architectures that do something of their own: what is quantized, trained and merged is what transformers computes."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.operations.dequantize import DequantizeOptions, dequantize
from adaptkit.operations.inspect import inspect
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network.fused import fuse_layers
from adaptkit.training.network.loading import load_adapter
from adaptkit.training.network.model import load_model, new_adapter

SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 16, "hidden_size_per_layer_input": 16,
          "vocab_size_per_layer_input": 301, "sliding_window": 32,
          "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # layers return attention weights, unasked
    "bloom": {},
    # weights that are read and not called, and hidden states that stay in float32
    "mamba": {"state_size": 8},
    # infinite defaults in the configuration
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
              "attn_layer_indices": [1]},
    # a norm with a gate
    "qwen3_5_text": {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                     "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_value_heads": 4},
    # a router of one row
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                  "shared_expert_intermediate_size": 64},
    # results of linear layers that are changed in place
    "llama4_text": {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 128, "moe_layers": [1]},
    # keys and values that layers take over from others, and a further input of every layer
    "gemma4_text": SHARED,
    "gemma3n_text": SHARED | {"laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4,
                              "intermediate_size": [128] * 4},
}  # fmt: skip
IDS = torch.arange(3, 27)[None]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tmp_path_factory) -> Path:
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = tiny.write_tokenizer(folder)
    values = tiny._DECODER | ARCHITECTURES[request.param] | tiny._token_ids(tokenizer)
    config = AutoConfig.for_model(request.param, vocab_size=len(tokenizer), **values)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "nf4"
    quantize(base, folder)
    return folder


def logits(network):
    with torch.no_grad():
        return network(input_ids=IDS, use_cache=False).logits.double()


def in_transformers(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_the_packed_model_computes_what_transformers_does_with_its_weights(packed, tmp_path):
    assert inspect(packed).details["quantized_matrices"] > 0
    dequantize(packed, tmp_path / "plain", DequantizeOptions(dtype="float32"))
    model = load_model(packed, torch.float32, torch.device("cpu"))
    fuse_layers(model.network)
    assert difference(logits(model.network), in_transformers(tmp_path / "plain")) < 1e-4


def test_a_trained_adapter_merged_is_what_it_was_trained_as(base, tmp_path):
    """On the plain base, so that nothing but rounding lies between the two."""
    data = tiny.write_instructions(tmp_path / "rows.jsonl", rows=8)
    config = TrainConfig(
        base=str(base), data=(str(data),), steps=3, rank=4, max_length=64, device="cpu", learning_rate=3e-3,
        compute_dtype="float32",
    )  # fmt: skip
    train(config, tmp_path / "adapter")
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    model = load_model(base, torch.float32, torch.device("cpu"))
    before = logits(model.network)
    load_adapter(model, read_adapter(tmp_path / "adapter"))
    trained, merged = logits(model.network), in_transformers(tmp_path / "merged")
    assert difference(merged, trained) < 1e-4
    assert difference(trained, before) > 1e-2


def test_gradients_do_not_depend_on_checkpointing(packed):
    found = []
    for policy in ("none", "layer", "sqrt"):
        model = load_model(packed, torch.float32, torch.device("cpu"))
        new_adapter(model, ("*",), 2, 4.0, "kaiming", 0.0, 0)
        for number, layer in enumerate(model.adapted().values()):
            layer.lora_b.data.normal_(std=0.02, generator=torch.Generator().manual_seed(number))
        fuse_layers(model.network)
        checkpoint_layers(model.network, choose_checkpointing(model.network, policy, None))
        model.network.train()
        torch.manual_seed(0)
        model.network(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
        found.append({n: p.grad for n, p in model.network.named_parameters() if p.requires_grad})
    everything, *others = found
    assert any(float(grad.abs().sum()) > 0 for grad in everything.values() if grad is not None)
    for other in others:
        for name, grad in everything.items():
            assert (grad is None) == (other[name] is None)
            assert grad is None or torch.equal(grad, other[name])
