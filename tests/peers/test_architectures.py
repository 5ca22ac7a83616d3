"""Unusual architectures: quantized, trained and merged models compute what transformers does."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.errors import AdapterError, BaseMismatchError
from adaptkit.operations.check import check
from adaptkit.operations.dequantize import DequantizeOptions, dequantize
from adaptkit.operations.inspect import inspect
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.dry_run import plan_run
from adaptkit.training.fast import accelerate
from adaptkit.training.loop import train
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network.loading import load_adapter
from adaptkit.training.network.model import load_model
from adaptkit.training.network.new_adapters import AdapterShape, new_adapter

IDS = torch.arange(3, 27)[None]


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def base(request, tmp_path_factory) -> Path:
    return tiny.write_architecture(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def packed(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "nf4"
    quantize(base, folder)
    return folder


def logits(network):
    with torch.no_grad():
        return network(input_ids=IDS, use_cache=False).logits.double()


def in_transformers(folder):
    auto = tiny.auto_class(AutoConfig.from_pretrained(folder))
    return logits(auto.from_pretrained(folder, dtype=torch.float32).eval())


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


def short_run(base, folder):
    """A training run of enough steps to change a model's output."""
    data = tiny.write_instructions(folder / "rows.jsonl", rows=8)
    return TrainConfig(
        base=str(base), data=(str(data),), steps=3, rank=4, max_length=64, device="cpu", learning_rate=3e-3,
        compute_dtype="float32",
    )  # fmt: skip


def test_a_quantized_model_computes_what_transformers_does_with_its_dequantized_weights(packed, tmp_path):
    assert inspect(packed).details["quantized_matrices"] > 0
    dequantize(packed, tmp_path / "plain", DequantizeOptions(dtype="float32"))
    model = load_model(packed, torch.float32, torch.device("cpu"))
    accelerate(model.network, model.dtype, torch.device("cpu"), model.output_layer)
    assert difference(logits(model.network), in_transformers(tmp_path / "plain")) < 1e-4


def test_a_merged_model_computes_what_the_trained_adapter_does(base, tmp_path):
    """On the base that is not quantized, so that the two differ only by rounding."""
    config = short_run(base, tmp_path)
    train(config, tmp_path / "adapter")
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    model = load_model(base, torch.float32, torch.device("cpu"))
    before = logits(model.network)
    load_adapter(model, read_adapter(tmp_path / "adapter"))
    trained, merged = logits(model.network), in_transformers(tmp_path / "merged")
    assert difference(merged, trained) < 1e-4
    assert difference(trained, before) > 1e-2


@pytest.mark.parametrize("name", ["gemma3n_text", "mamba", "falcon"])
def test_peft_computes_what_was_trained(name, tmp_path, monkeypatch):
    """Gemma 3n names linear layers 0, 1 and 2, like decoder layers; Mamba has one that is never called.

    Falcon's are of a subclass, which quantize does not quantize.
    """
    monkeypatch.setitem(tiny.ARCHITECTURES, "falcon", {"bias": True, "alibi": True})
    base = tiny.write_architecture(tmp_path / "base", name)
    config = short_run(base, tmp_path)
    train(config, tmp_path / "adapter")
    model = load_model(base, torch.float32, torch.device("cpu"))
    load_adapter(model, read_adapter(tmp_path / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    in_peft = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert difference(logits(in_peft), logits(model.network)) < 1e-5


def test_adapters_of_shared_layers_cannot_be_merged_and_train_warns_of_that(tmp_path, monkeypatch):
    """Every use of Zamba's attention gets its own adapter, as in peft, but the files hold the weight once."""
    values = {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "n_mamba_heads": 2,
        "num_key_value_heads": 4, "attention_head_dim": 32, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    }  # fmt: skip
    monkeypatch.setitem(tiny.ARCHITECTURES, "zamba", values)
    base = tiny.write_architecture(tmp_path / "base", "zamba")
    data = tiny.write_instructions(tmp_path / "rows.jsonl", rows=8)
    config = TrainConfig(
        base=str(base), data=(str(data),), steps=1, max_length=64, device="cpu", batch_size=1, held_out=0
    )
    said = "the adapter cannot be merged: 7 of its layers share weights with other layers: "
    for more in ({"rank": 2, "exclude": ("*.shared_transf.*",)}, {"method": "full"}):
        assert plan_run(replace(config, **more), tmp_path / "adapter").cannot_be_merged == ""
    notes, settings = [], replace(config, rank=2, targets=("model.layers.1.shared_transf.*",))
    assert plan_run(settings, tmp_path / "adapter").cannot_be_merged.startswith(said)
    train(settings, tmp_path / "adapter", note=notes.append)
    assert any(note.startswith(said) for note in notes)
    with pytest.raises(AdapterError, match="which is shared with other layers") as caught:
        merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert "train the adapter without the shared layers" in caught.value.hint


def test_adapters_of_weights_that_files_store_joined_cannot_be_merged_and_train_warns_of_that(tmp_path, monkeypatch):
    """The files of HRM hold gate_proj and up_proj as one tensor, from which transformers cuts both."""
    monkeypatch.setitem(tiny.ARCHITECTURES, "hrm_text", {"num_layers_per_stack": 1, "head_dim": 16})
    base = tiny.write_architecture(tmp_path / "base", "hrm_text")
    data = tiny.write_instructions(tmp_path / "rows.jsonl", rows=8)
    config = TrainConfig(
        base=str(base), data=(str(data),), steps=1, max_length=64, device="cpu", batch_size=1, held_out=0, rank=2
    )
    for more in ({"targets": ("o_proj", "down_proj")}, {"targets": ("o_proj",), "modules_to_save": ("down_proj",)}):
        planned = plan_run(replace(config, **more), tmp_path / "adapter")
        assert planned.cannot_be_merged == ""
    notes, found = [], "of its layers have weights that the files store otherwise: model.H_module.layers.0."
    assert found in plan_run(config, tmp_path / "adapter").cannot_be_merged
    whole = replace(config, targets=("o_proj",), modules_to_save=("up_proj",))
    assert found in plan_run(whole, tmp_path / "adapter").cannot_be_merged
    train(config, tmp_path / "adapter", note=notes.append)
    assert any(found in note for note in notes)
    with pytest.raises(BaseMismatchError, match="assembles from several tensors in an unsupported way"):
        merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    train(replace(config, targets=("o_proj", "down_proj")), tmp_path / "other")
    merge(base, [tmp_path / "other"], tmp_path / "merged")


SHARING = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values", "others", "count"),
    [
        ("laguna", {**tiny.ARCHITECTURES["qwen2_moe"], "head_dim": 16}, "*.shared_experts.*", 3),
        ("deepseek_v3", SHARING, "*.mlp.*", 6),
    ],
)
def test_adapters_that_peft_drops_are_reported(name, values, others, count, tmp_path, monkeypatch):
    """peft drops Laguna's shared experts: a dot in its rule for the names of older checkpoints matches an s.

    It also drops DeepSeek's layers next to its experts, since those have the same names.
    """
    monkeypatch.setitem(tiny.ARCHITECTURES, name, values)
    base = tiny.write_architecture(tmp_path / "base", name)
    config = short_run(base, tmp_path)
    for number, is_taken in enumerate((False, True)):
        adapter, notes = tmp_path / f"adapter-{number}", []
        settings = replace(config, exclude=(others,) * is_taken)
        train(settings, adapter, note=notes.append)
        assert check(adapter, ["peft"], base=base).verdicts[0].taken == is_taken
        about = [note for note in notes if "peft drops" in note]
        assert about == [plan_run(settings, tmp_path / "another").peft_drops] * (not is_taken)
        assert all(f"peft drops {count} adapters" in note for note in about)
        model = load_model(base, torch.float32, torch.device("cpu"))
        load_adapter(model, read_adapter(adapter))
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            in_peft = PeftModel.from_pretrained(plain, adapter).eval()
        assert (difference(logits(in_peft), logits(model.network)) < 1e-5) == is_taken


@pytest.mark.parametrize("base", ["deepseek_v4", "mamba", "llama4_text", "gemma3n_text"], indirect=True)
def test_gradients_do_not_depend_on_checkpointing(packed):
    found = []
    for policy in ("none", "layer", "sqrt"):
        model = load_model(packed, torch.float32, torch.device("cpu"))
        new_adapter(model, ("*",), AdapterShape(2, 4.0), "kaiming", 0.0, 0)
        for number, layer in enumerate(model.adapted().values()):
            layer.lora_b.data.normal_(std=0.02, generator=torch.Generator().manual_seed(number))
        accelerate(model.network, model.dtype, torch.device("cpu"), model.output_layer)
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


def test_the_target_star_means_text_layers_except_routers_and_what_peft_refuses(packed):
    model = load_model(packed, torch.float32, torch.device("cpu"))
    new_adapter(model, ("*",), AdapterShape(2, 4.0), "kaiming", 0.0, 0)
    left = set(model.linears) - set(model.adapted())
    others = {name for name in model.linears if "vision" in name or "projector" in name}
    if model.network.config.model_type == "mamba":
        others |= {name for name in model.linears if name.endswith((".out_proj", ".dt_proj"))}
    others |= {name for name in model.linears if ".indexer." in name}  # they only choose tokens: no gradient passes
    assert left == others | {name for name in model.linears if name.endswith((".router", ".shared_expert_gate"))}
    assert model.adapted()
