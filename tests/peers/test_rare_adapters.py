"""Adapters that peft writes in unusual forms: merged or extracted ones give what peft's model computes."""

import peft_adapters
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import WEIGHTS
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
)

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.errors import AdapterError
from adaptkit.operations.extract import ExtractOptions, extract
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.unmerge import unmerge
from adaptkit.training.network.loading import load_adapter
from adaptkit.training.network.model import load_model


def load(folder, kinds=AutoModelForCausalLM):
    return kinds.from_pretrained(folder, dtype=torch.float32)


def outputs(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 33)[None], use_cache=False).logits


def randomize(model, scale):
    """Change all trainable parameters; magnitudes stay above zero."""
    for parameter in (p for p in model.parameters() if p.requires_grad):
        draw = torch.rand if parameter.dim() < 2 and bool((parameter > 0).all()) else torch.randn
        parameter.data += draw(parameter.shape) * scale


@pytest.mark.parametrize(("kind", "bias"), [("roberta", "all"), ("electra", "lora_only")])
def test_a_saved_head_of_several_layers_is_read_with_its_biases(tmp_path, kind, bias):
    """peft saves the biases inside such a head three times: as biases, in the trained copy and in the original."""
    values = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "num_labels": 3}
    config = AutoConfig.for_model(kind, num_attention_heads=4, embedding_size=32, pad_token_id=0, **values)
    kinds = AutoModelForSequenceClassification
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    with peft_adapters.quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kinds.from_config(config).save_pretrained(base)
        lora = LoraConfig(r=2, target_modules=["query"], bias=bias, task_type="SEQ_CLS")
        model = get_peft_model(load(base, kinds), lora)
        randomize(model, 0.1)
        model.save_pretrained(adapter)
        before, wanted = outputs(load(base, kinds)), outputs(PeftModel.from_pretrained(load(base, kinds), adapter))
        merge(base, [adapter], tmp_path / "out")
        found = outputs(load(tmp_path / "out", kinds))
    assert (before - wanted).norm() > 0.05 * wanted.norm()
    assert (found - wanted).norm() < 5e-6 * wanted.norm()
    unmerge(tmp_path / "out", [adapter], tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    peft_adapters.change_tensors(
        adapter, lambda t: [t[key].add_(1.0) for key in list(t) if key.endswith(".modules_to_save.default.dense.bias")]
    )
    if bias == "all":
        with pytest.raises(AdapterError, match="should be identical, but differ"):
            merge(base, [adapter], tmp_path / "other")


SMALL = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
STACKS = {
    "nemotron_h": SMALL | {
        "layers_block_type": ["moe"], "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1, "intermediate_size": 48,
    },
    "inkling_text": SMALL | {
        "num_hidden_layers": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "intermediate_size": 48, "n_shared_experts": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", STACKS)
def test_separate_stacks_of_gate_and_up_are_distinguished(tmp_path, kind):
    """All are square here, so shapes do not show which tensors belong to which stack."""
    tiny.need_architecture(kind)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    with peft_adapters.quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **STACKS[kind])).save_pretrained(base)
        stacks = [name for name, p in load(base).named_parameters() if p.dim() == 3 and "expert" in name]
        assert len(stacks) > 1
        model = get_peft_model(load(base), LoraConfig(r=2, target_modules=[], target_parameters=stacks))
        randomize(model, 0.3)
        model.save_pretrained(adapter)
        before, wanted = outputs(load(base)), outputs(PeftModel.from_pretrained(load(base), adapter))
        merge(base, [adapter], tmp_path / "out")
        found = outputs(load(tmp_path / "out"))
    assert (before - wanted).norm() > 0.01 * wanted.norm()
    assert (found - wanted).norm() < 5e-6 * wanted.norm()


def test_magnitudes_that_peft_writes_twice_are_read_once(tmp_path):
    """It does so for the embedding of a resized vocabulary, unless that is called ``embed_tokens``."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    with peft_adapters.quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=64)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        model = load(base)
        model.resize_token_embeddings(66)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_fc", "wte"], use_dora=True))
        randomize(model, 0.1)
        model.save_pretrained(adapter)
        wanted = outputs(model)
        merge(base, [adapter], tmp_path / "out", MergeOptions(untie=True))
        found = outputs(load(tmp_path / "out"))
    magnitudes = [key for key in load_file(adapter / WEIGHTS) if "wte.lora_magnitude_vector" in key]
    assert len(magnitudes) == 2
    assert (found - wanted).norm() < 5e-6 * wanted.norm()
    peft_adapters.change_tensors(adapter, lambda tensors: tensors[magnitudes[1]].add_(1.0))
    with pytest.raises(AdapterError, match="should be identical, but differ"):
        merge(base, [adapter], tmp_path / "other", MergeOptions(untie=True))


def test_an_extracted_norm_inside_an_extracted_embedding_is_saved_with_it(tmp_path):
    """peft does not find a module of ``modules_to_save`` that is inside another of them."""
    tiny.need_architecture("inkling_text")
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    with peft_adapters.quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("inkling_text", **STACKS["inkling_text"])
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(base)
        for name in ("model.embed_tokens.weight", "model.embed_tokens.embed_norm.weight"):
            model.get_parameter(name).data.mul_(1 + torch.rand(model.get_parameter(name).shape))
        model.save_pretrained(tuned)
        extract(tuned, base, tmp_path / "adapter", ExtractOptions(rank=2))
        begun = load(base)
        wanted, before = outputs(load(tuned)), outputs(begun)
        found = outputs(PeftModel.from_pretrained(begun, tmp_path / "adapter"))
    assert (before - wanted).norm() > 0.01 * wanted.norm()
    assert (found - wanted).norm() < 5e-6 * wanted.norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_weight_that_target_parameters_names_has_its_own_patterns_and_orientation(tmp_path, kind):
    """peft matches patterns with the parameter's name, and adds BA as the weight is stored, also for a Conv1D."""
    leaf, others = ("c_proj", {"n_head": 4}) if kind == "gpt2" else ("o_proj", {"num_attention_heads": 4})
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    with peft_adapters.quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=61, hidden_size=32, num_hidden_layers=1, **others)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        patterns = {"rank_pattern": {f"{leaf}.weight": 3}, "alpha_pattern": {f"attn.{leaf}.weight": 30, leaf: 90}}
        lora = LoraConfig(r=2, target_modules=[], target_parameters=[f"{leaf}.weight"], **patterns)
        model = get_peft_model(load(base), lora)
        randomize(model, 0.3)
        model.save_pretrained(adapter)
        before, wanted = outputs(load(base)), outputs(PeftModel.from_pretrained(load(base), adapter))
        merge(base, [adapter], tmp_path / "out")
        merged = outputs(load(tmp_path / "out"))
        evaluated = load_model(base, torch.float32, torch.device("cpu"))
        load_adapter(evaluated, read_adapter(adapter))
        found = outputs(evaluated.network)
    assert (before - wanted).norm() > 0.05 * wanted.norm()
    assert (merged - wanted).norm() < 5e-6 * wanted.norm()
    assert (found - wanted).norm() < 5e-6 * wanted.norm()
