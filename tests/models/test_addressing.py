"""Parameters are found under the names that files use, or reported as missing."""

import re
import subprocess
import sys

import pytest
import tiny
from folders import edit_json
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError
from adaptkit.models.addressing import Slice, find_addresses
from adaptkit.numerics.tensors import as_tensor

NAMES = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"]


def test_identical_names_are_found_without_a_note(llama):
    found = find_addresses(Checkpoint(llama), NAMES, "a")
    assert found.of == {name: (Slice(name),) for name in NAMES}
    assert found.mapping_note == ""


@pytest.mark.parametrize("said", ["", "model.language_model.", "language_model.model."])
def test_a_different_prefix_of_all_names_is_found_and_noted(llama, said):
    asked = {said + name.removeprefix("model."): name for name in NAMES}
    found = find_addresses(Checkpoint(llama), asked, "a")
    assert found.of == {name: (Slice(held),) for name, held in asked.items()}
    assert "'model.'" in found.mapping_note


def test_the_hubs_gpt2_files_without_the_models_prefix_are_found(tmp_path, gpt2, copy_of):
    folder = copy_of(gpt2)
    tensors = load_file(folder / "model.safetensors")
    save_file({k.removeprefix("transformer."): v for k, v in tensors.items()}, folder / "model.safetensors")
    found = find_addresses(Checkpoint(folder), ["transformer.h.0.attn.c_attn.weight"], "a")
    assert found.of == {"transformer.h.0.attn.c_attn.weight": (Slice("h.0.attn.c_attn.weight"),)}


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.bias", "x"])
def test_missing_parameters_are_named_in_the_error(llama, name):
    with pytest.raises(BaseMismatchError, match=re.escape(name)):
        find_addresses(Checkpoint(llama), [*NAMES, name], "a")


@pytest.mark.parametrize("layer", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
def test_the_hint_for_a_bias_that_an_existing_layer_lacks_mentions_lora_bias(llama, layer):
    """An adapter with lora_bias trains a bias in all of its layers."""
    with pytest.raises(BaseMismatchError, match=rf"changes {layer}\.bias, which .* does not have") as caught:
        find_addresses(Checkpoint(llama), [f"{layer}.weight", f"{layer}.bias"], "x")
    assert caught.value.hint.startswith("if the adapter has lora_bias, load it with peft")
    with pytest.raises(BaseMismatchError) as caught:
        find_addresses(Checkpoint(llama), ["model.layers.9.mlp.down_proj.bias"], "x")
    assert caught.value.hint.startswith("use the model that the adapter was trained on")


def test_a_single_name_with_a_different_prefix_is_not_found(llama):
    with pytest.raises(BaseMismatchError, match=r"layers\.0\.mlp\.wrong"):
        find_addresses(Checkpoint(llama), [*NAMES, "layers.0.mlp.wrong.weight"], "a")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_stack_of_experts_is_found_in_files_with_a_matrix_per_expert(tmp_path, family):
    """Each matrix of the files is the part of transformers' parameter that its slice says."""
    import torch
    from transformers import AutoModelForCausalLM

    base = tiny.write_family(tmp_path / "base", family)
    checkpoint = Checkpoint(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    names = [f"model.layers.1.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
    for name, slices in find_addresses(checkpoint, names, "a").of.items():
        parameter = model.get_parameter(name)
        assert len(slices) == len(parameter) * slices[0].part[1]
        for piece in slices:
            number, count = piece.part
            rows = parameter.shape[1] // count
            expected = parameter[piece.expert, number * rows : (number + 1) * rows]
            assert torch.equal(as_tensor(checkpoint.read(piece.name)), expected)


def test_an_unknown_architecture_gives_a_base_mismatch_error(llama, copy_of):
    folder = copy_of(llama)
    edit_json(folder / "config.json", model_type="nobodys")
    with pytest.raises(BaseMismatchError, match="experts"):
        find_addresses(Checkpoint(folder), ["model.layers.0.mlp.experts.down_proj"], "a")


def test_an_audio_model_is_built_by_the_name_of_its_class(tmp_path):
    """transformers does not list it as a language model; most versions give its files other names than the model's."""
    import torch
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    text = {"model_type": "qwen2", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
             "num_mel_bins": 16, "max_source_positions": 20}  # fmt: skip
    model = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(text_config=text, audio_config=audio))
    model.save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint(tmp_path / "base")
    names = [name for name, _ in model.named_parameters() if name.endswith("q_proj.weight")]
    assert len(names) == 2
    found = find_addresses(checkpoint, names, "a").of
    for name in names:
        (place,) = found[name]
        assert torch.equal(as_tensor(checkpoint.read(place.name)), model.get_parameter(name))


def test_a_vision_tower_is_found_though_the_language_model_has_none(tmp_path):
    """From Mllama's configuration transformers builds a text-only model, unless the class is given by name."""
    import torch
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1],
            "pad_token_id": 0}  # fmt: skip
    image = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1,
             "attention_heads": 4, "image_size": 28, "patch_size": 14, "vision_output_dim": 64,
             "intermediate_layers_indices": [0]}  # fmt: skip
    model = MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=image))
    model.save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint(tmp_path / "base")
    names = [name for name, _ in model.named_parameters() if name.endswith("q_proj.weight")]
    assert {name.split(".")[1] for name in names} == {"vision_model", "language_model"}
    found = find_addresses(checkpoint, names, "a").of
    assert all(
        torch.equal(as_tensor(checkpoint.read(found[name][0].name)), model.get_parameter(name)) for name in names
    )
    with pytest.raises(BaseMismatchError, match=r"changes model\.nobodys\.weight"):
        find_addresses(checkpoint, [*names, "model.nobodys.weight"], "a")


def test_threads_can_build_networks_at_once_and_torchs_default_dtype_is_unchanged(llama):
    """In a separate process, in which transformers is not imported yet."""
    code = """
import sys, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.models.architecture import empty_network
def ask(folder):
    return {name: p.dtype for name, p in empty_network(Checkpoint(folder)).named_parameters()}
with ThreadPoolExecutor(6) as pool:
    found = list(pool.map(ask, [Path(sys.argv[1])] * 24))
assert set(found[0].values()) == {torch.bfloat16} and found == found[:1] * 24
assert torch.get_default_dtype() == torch.float32, torch.get_default_dtype()
"""
    done = subprocess.run([sys.executable, "-c", code, str(llama)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("writer", ["transformers 4", "transformers 5"])
def test_parameters_are_found_by_their_names_in_transformers_4(tmp_path, writer):
    """LLaVA's tower had a ``vision_model`` then: in files, and with the prefix ``model.`` in the running model."""
    import torch
    from transformers import LlavaForConditionalGeneration

    base = tiny.write_llava(tmp_path / "base", older=writer == "transformers 4")
    checkpoint = Checkpoint(base)
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    inside = {"vision_tower.vision_model.encoder": "vision_tower.encoder", "language_model": "language_model"}
    layer = "layers.0.self_attn.q_proj.weight"
    names = {f"model.{said}.{layer}": f"model.{today}.{layer}" for said, today in inside.items()}
    found = find_addresses(checkpoint, names, "a").of
    for name, today in names.items():
        assert torch.equal(as_tensor(checkpoint.read(found[name][0].name)), model.get_parameter(today))
    wrong = "model.vision_tower.vision_model.encoder.layers.9.self_attn.q_proj.weight"
    with pytest.raises(BaseMismatchError, match=re.escape(f"changes {wrong}")):
        find_addresses(checkpoint, [*names, wrong], "a")
    with pytest.raises(BaseMismatchError, match="the same parameter"):
        find_addresses(checkpoint, {*names, *names.values()}, "a")
