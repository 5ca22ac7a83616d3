"""A loaded model computes what transformers computes; checkpoints and adapters that do not fit are refused."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from folders import edit_json, rewritten
from peft_formulas import running
from transformers import AutoConfig, AutoModelForCausalLM, LlamaPreTrainedModel

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.reader import Checkpoint, MappedCheckpoint
from adaptkit.errors import BaseMismatchError, CheckpointError, UsageError
from adaptkit.formats._find import quantized_names
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.tensors import as_tensor
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.training.fast import accelerate
from adaptkit.training.network import model
from adaptkit.training.network.frozen import PackedWeight
from adaptkit.training.network.loading import attach_adapter
from adaptkit.training.network.model import load_model
from adaptkit.training.network.new_adapters import AdapterShape, new_adapter
from adaptkit.training.network.packed import read_quantized

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 33, 71, 100, 7, 12, 64]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_are_those_of_the_dequantized_checkpoint_in_transformers(family, request, tmp_path):
    source = request.getfixturevalue(family)
    quantize(source, tmp_path / "nf4")
    dequantize(tmp_path / "nf4", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    checkpoint = Checkpoint(tmp_path / "nf4")
    for name in quantized_names(checkpoint):  # in float32; the plain checkpoint holds them rounded to bfloat16
        weight = read_quantized(checkpoint, name).dequantize(torch.float32)
        parameter = plain.get_parameter(name)
        parameter.data.copy_(weight.T if family == "gpt2" else weight)
    expected = logits(plain)
    model = load_model(tmp_path / "nf4", torch.float32, CPU)
    packed = [layer for layer in model.linears.values() if isinstance(layer.base, PackedWeight)]
    assert len(packed) == len(model.linears)
    assert torch.allclose(logits(model.network), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plain_checkpoint_gives_the_logits_of_transformers(family, request):
    source = request.getfixturevalue(family)
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    assert torch.allclose(logits(load_model(source, torch.float32, CPU).network), expected, atol=1e-5)


def test_an_adapter_gives_the_logits_of_peft(llama, adapter):
    expected = logits(running(llama, adapter))
    model = load_model(llama, torch.float32, CPU)
    without = logits(model.network)
    attach_adapter(model, read_adapter(adapter).modules, "adapter")
    assert torch.allclose(logits(model.network), expected, atol=1e-5)
    assert not torch.allclose(without, expected, atol=1e-3)


def test_a_fresh_adapter_changes_no_logit_and_is_reproducible_by_its_seed(llama_nf4):
    model = load_model(llama_nf4, torch.float32, CPU)
    before = logits(model.network)
    new_adapter(model, ("*",), AdapterShape(4, 8.0), "kaiming", 0.0, seed=3)
    assert torch.equal(logits(model.network), before)
    again = load_model(llama_nf4, torch.float32, CPU)
    new_adapter(again, ("*",), AdapterShape(4, 8.0), "kaiming", 0.0, seed=3)
    for name, layer in model.adapted().items():
        assert torch.equal(layer.lora_a, again.linears[name].lora_a)
        bound = layer.base.shape[1] ** -0.5
        assert float(layer.lora_a.detach().abs().max()) <= bound
        assert float(layer.lora_a.detach().abs().max()) > 0.8 * bound
    assert len(model.adapted()) == len(model.linears)


def test_normal_initialization_has_a_standard_deviation_of_one_over_rank(llama_nf4):
    model = load_model(llama_nf4, torch.float32, CPU)
    new_adapter(model, ("*",), AdapterShape(8, 8.0), "normal", 0.0, seed=0)
    values = torch.cat([layer.lora_a.detach().reshape(-1) for layer in model.adapted().values()])
    assert float(values.std()) == pytest.approx(1 / 8, rel=0.05)


def test_targets_match_layers_by_last_part_or_path(llama_nf4):
    model = load_model(llama_nf4, torch.float32, CPU)
    new_adapter(model, ("q_proj", "model.layers.1.mlp.*"), AdapterShape(2, 4.0), "kaiming", 0.0, seed=0)
    expected = {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    expected |= {f"model.layers.1.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")}
    assert set(model.adapted()) == expected
    assert {name for name, p in model.network.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{half}" for name in expected for half in "ab"
    }


def test_an_adapter_for_another_model_is_refused(llama_nf4):
    model = load_model(llama_nf4, torch.float32, CPU)
    change = LowRank.of_tensors(torch.zeros(2, 64), torch.zeros(64, 2), 1.0)
    with pytest.raises(BaseMismatchError, match="does not have"):
        attach_adapter(model, {"model.layers.9.self_attn.q_proj": change}, "adapter")
    with pytest.raises(BaseMismatchError, match="gate_proj"):
        attach_adapter(model, {"model.layers.0.mlp.gate_proj": change}, "adapter")


def test_a_checkpoint_with_a_different_number_of_layers_than_its_config_is_refused(llama_nf4, copy_of):
    folder = copy_of(llama_nf4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"layers\.2\."):
        load_model(folder, torch.float32, CPU)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"layers\.1\."):
        load_model(folder, torch.float32, CPU)


def test_a_bias_that_is_missing_or_unknown_is_refused(llama, gpt2, copy_of):
    name = "transformer.h.0.attn.c_attn.bias"
    without = rewritten(copy_of(gpt2), lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"has no transformer\.h\.0\.attn\.c_attn\.bias"):
        load_model(without, torch.float32, CPU)
    name = "model.layers.0.mlp.up_proj.bias"
    added = rewritten(copy_of(llama), lambda tensors: tensors.update({name: torch.zeros(128)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.bias: unknown to LlamaForCausalLM"):
        load_model(added, torch.float32, CPU)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("llama", "model.layers.{}.self_attn"),
        ("gpt2", "transformer.h.{}.attn"),
        ("gpt_neox", "gpt_neox.layers.{}.attention"),
    ],
)
def test_buffers_that_older_transformers_saved_are_ignored(name, layer, tmp_path):
    """Causal masks, masking values, positions and rotary frequencies, as in the files of Pythia and Llama 1."""
    values = tiny._DECODER | {"vocab_size": 301, "pad_token_id": 0}
    config = AutoConfig.for_model(name, **values)
    folder = tiny._save(tmp_path / name, lambda: AutoModelForCausalLM.from_config(config), "float32", 1, 0)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    mask = torch.ones(512, 512, dtype=torch.bool).tril()[None, None]
    masks = {} if name == "llama" else {"bias": mask, "masked_bias": torch.tensor(-1e9)}
    buffers = masks | ({} if name == "gpt2" else {"rotary_emb.inv_freq": torch.rand(8)})
    older = {f"{layer.format(number)}.{key}": value.clone() for number in range(2) for key, value in buffers.items()}
    rewritten(folder, lambda tensors: tensors.update(older, **{"embeddings.position_ids": torch.arange(512)[None]}))
    assert torch.allclose(logits(load_model(folder, torch.float32, CPU).network), expected, atol=1e-5)
    quantize(folder, tmp_path / "nf4")
    assert len(load_model(tmp_path / "nf4", torch.float32, CPU).linears) > 0


def test_the_error_for_a_checkpoint_whose_tensors_only_look_like_gptq_names_the_method(llama, copy_of):
    def quantized(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(8, 128, dtype=torch.int32)
        tensors["model.layers.0.mlp.up_proj.g_idx"] = torch.zeros(64, dtype=torch.int32)

    folder = rewritten(copy_of(llama), quantized)
    with pytest.raises(CheckpointError, match=r"is quantized with GPTQ, which train and evaluate cannot use"):
        load_model(folder, torch.float32, CPU)


def test_a_weight_of_the_wrong_shape_is_refused(llama, copy_of):
    name = "model.layers.1.mlp.up_proj.weight"
    changed = rewritten(copy_of(llama), lambda tensors: tensors.update({name: torch.zeros(64, 64)}))
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: expected shape \[128, 64\], found \[64, 64\]"
    ):
        load_model(changed, torch.float32, CPU)


def test_a_missing_buffer_that_the_architecture_does_not_compute_is_refused(llama, monkeypatch):
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(CheckpointError, match=r"^model\.rotary_emb\.\w*inv_freq: missing in the files"):
        load_model(llama, torch.float32, CPU)


def test_a_buffer_that_an_enclosing_module_computes_is_initialized(tmp_path, monkeypatch):
    """Falcon H1 scales the inputs of its state space layers by factors that no file holds."""
    values = {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
        "head_dim": 16, "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.8],
    }  # fmt: skip
    monkeypatch.setitem(tiny.ARCHITECTURES, "falcon_h1", values)
    folder, ids = tiny.write_architecture(tmp_path / "base", "falcon_h1"), torch.arange(3, 27)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = load_model(folder, torch.float32, CPU).network
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("name", ["bert", "cpmant"])
def test_a_model_that_is_not_causal_is_refused(name, tmp_path, monkeypatch):
    """Batches are padded without a mask, and predicting a token that is visible would mean copying it."""
    monkeypatch.setitem(tiny.ARCHITECTURES, name, {"num_key_value_heads": 4, "dim_head": 16, "dim_ff": 128})
    folder = tiny.write_architecture(tmp_path / "base", name)
    with pytest.raises(UsageError, match="is not causal"):
        load_model(folder, torch.float32, CPU)
    if name == "bert":
        edit_json(folder / "config.json", is_decoder=True)
        load_model(folder, torch.float32, CPU)


def test_a_file_without_the_models_name_prefix_is_loaded(gpt2, copy_of):
    """The Hub's GPT-2 is such a file; it also has causal masks that older versions of transformers wrote."""
    expected = logits(load_model(gpt2, torch.float32, CPU).network)

    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128).tril()

    model = load_model(rewritten(copy_of(gpt2), bare), torch.float32, CPU)
    assert torch.equal(logits(model.network), expected)
    assert "transformer.h.0.attn.c_attn" in model.linears


def test_a_quantized_output_layer_is_used_but_is_not_a_target(tmp_path):
    source = tiny.write_llama(tmp_path / "source", tied=False)
    quantize(source, tmp_path / "nf4", QuantizeOptions(include_head=True))
    model = load_model(tmp_path / "nf4", torch.float32, CPU)
    checkpoint = Checkpoint(tmp_path / "nf4")
    assert "lm_head" not in model.linears
    with torch.no_grad():
        hidden = model.network.model(IDS).last_hidden_state
        head = read_quantized(checkpoint, "lm_head.weight").dequantize(torch.float32)
        assert torch.allclose(logits(model.network), hidden @ head.T, atol=1e-5)


def mapped(address):
    """Return the file that is mapped at an address; empty for ordinary memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5) if line.count("/") else (line.split()[0], "")
        start, end = (int(edge, 16) for edge in span.split("-"))
        if start <= address < end:
            return name
    raise ValueError(address)


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps to see which memory is mapped from a file"
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "llama_nf4"])
def test_weights_are_views_of_the_files(family, request):
    folder = request.getfixturevalue(family)
    model = load_model(folder, torch.float32 if family == "gpt2" else torch.bfloat16, CPU)
    tensors = [t for layer in model.linears.values() for t in layer.base.buffers() if t.numel() > 1000]
    tensors += [parameter for parameter in model.network.parameters() if parameter.dim() > 1]
    assert len(tensors) > len(model.linears)
    assert {mapped(tensor.data_ptr()) for tensor in tensors} == {str(folder / "model.safetensors")}


@pytest.mark.parametrize("is_small", [False, True])
def test_an_unused_network_is_freed_before_the_next_is_loaded_unless_it_is_small(
    llama, llama_nf4, monkeypatch, is_small
):
    held = sum(item.spec.nbytes for item in Checkpoint(llama_nf4).tensors.values())
    monkeypatch.setattr(model, "_SMALL_BYTES", 1 << 62 if is_small else held - 1)  # other tests' networks may exist
    gc.collect()
    gc.disable()
    try:
        network = load_model(llama_nf4, torch.float32, CPU).network
        accelerate(network, torch.float32, CPU)
        former = weakref.ref(network.model.layers[1])
        del network
        assert former() is not None  # its new forward function refers to it
        load_model(llama, torch.float32, CPU)
        assert (former() is None) != is_small
    finally:
        gc.enable()


def test_writing_to_a_mapped_tensor_does_not_change_the_file(llama):
    before = (llama / "model.safetensors").read_bytes()
    checkpoint = MappedCheckpoint(llama)
    for name in checkpoint.tensors:
        tensor = as_tensor(checkpoint.read(name))
        assert torch.equal(tensor, as_tensor(Checkpoint(llama).read(name)))
        tensor.zero_()
    assert (llama / "model.safetensors").read_bytes() == before
