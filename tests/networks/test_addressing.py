"""Parameters are found under the names that files use, or named as missing."""

import json
import re
import subprocess
import sys

import pytest
import tiny
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError
from adaptkit.networks.addressing import Slice, find_addresses

NAMES = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"]


def test_the_same_names_are_found_without_a_word(llama):
    found = find_addresses(Checkpoint(llama), NAMES, "a")
    assert found.of == {name: (Slice(name),) for name in NAMES}
    assert found.mapping_note == ""


@pytest.mark.parametrize("said", ["", "model.language_model.", "language_model.model."])
def test_another_beginning_of_all_names_is_found_and_told(llama, said):
    asked = {said + name.removeprefix("model."): name for name in NAMES}
    found = find_addresses(Checkpoint(llama), asked, "a")
    assert found.of == {name: (Slice(held),) for name, held in asked.items()}
    assert "'model.'" in found.mapping_note


def test_gpt2_of_the_hub_lacks_the_prefix_of_the_model(tmp_path, gpt2, copy_of):
    folder = copy_of(gpt2)
    tensors = load_file(folder / "model.safetensors")
    save_file({k.removeprefix("transformer."): v for k, v in tensors.items()}, folder / "model.safetensors")
    found = find_addresses(Checkpoint(folder), ["transformer.h.0.attn.c_attn.weight"], "a")
    assert found.of == {"transformer.h.0.attn.c_attn.weight": (Slice("h.0.attn.c_attn.weight"),)}


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.bias", "x"])
def test_what_is_not_there_is_named(llama, name):
    with pytest.raises(BaseMismatchError, match=re.escape(name)):
        find_addresses(Checkpoint(llama), [*NAMES, name], "a")


@pytest.mark.parametrize("layer", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
def test_a_bias_of_a_layer_without_one_is_not_laid_to_another_model_alone(llama, layer):
    """An adapter with lora_bias trains one wherever it is."""
    with pytest.raises(BaseMismatchError, match=rf"changes {layer}\.bias, which .* does not have") as caught:
        find_addresses(Checkpoint(llama), [f"{layer}.weight", f"{layer}.bias"], "x")
    assert caught.value.hint.startswith("if the adapter has lora_bias, load it with peft")
    with pytest.raises(BaseMismatchError) as caught:
        find_addresses(Checkpoint(llama), ["model.layers.9.mlp.down_proj.bias"], "x")
    assert caught.value.hint.startswith("use the model that the adapter was trained on")


def test_one_name_of_another_scheme_does_not_change_that_of_the_others(llama):
    with pytest.raises(BaseMismatchError, match=r"layers\.0\.mlp\.wrong"):
        find_addresses(Checkpoint(llama), [*NAMES, "layers.0.mlp.wrong.weight"], "a")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_stack_of_experts_is_found_in_one_matrix_an_expert(tmp_path, family):
    """Put together by the slices, the files' matrices are the parameter that transformers loads."""
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
            assert torch.equal(checkpoint.read(piece.name), expected)


def test_an_architecture_that_nobody_knows_is_no_traceback(llama, copy_of):
    folder = copy_of(llama)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nobodys"}))
    with pytest.raises(BaseMismatchError, match="experts"):
        find_addresses(Checkpoint(folder), ["model.layers.0.mlp.experts.down_proj"], "a")


def test_a_model_that_hears_is_asked_for_by_the_name_of_its_class(tmp_path):
    """transformers counts it among no language models, and its files call the tower and the text differently."""
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
        assert place.name != name
        assert torch.equal(checkpoint.read(place.name), model.get_parameter(name))


def test_a_tower_for_images_is_found_where_the_language_model_alone_has_none(tmp_path):
    """Of Mllama's configuration transformers builds a model that only reads, unless it is asked by the class's name."""
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
    assert all(torch.equal(checkpoint.read(found[name][0].name), model.get_parameter(name)) for name in names)
    with pytest.raises(BaseMismatchError, match=r"changes model\.nobodys\.weight"):
        find_addresses(checkpoint, [*names, "model.nobodys.weight"], "a")


def test_threads_may_ask_at_once_and_leave_torch_as_it_was(llama):
    """In a process of its own, in which transformers is not loaded yet."""
    code = """
import sys, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.networks.architecture import empty_network
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
def test_modules_that_transformers_4_called_otherwise_are_found_by_these_names(tmp_path, writer):
    """It had a ``vision_model`` in LLaVA's tower, in its files and with ``model.`` before it in the running model."""
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
        assert torch.equal(checkpoint.read(found[name][0].name), model.get_parameter(today))
    wrong = "model.vision_tower.vision_model.encoder.layers.9.self_attn.q_proj.weight"
    with pytest.raises(BaseMismatchError, match=re.escape(f"changes {wrong}")):
        find_addresses(checkpoint, [*names, wrong], "a")
    with pytest.raises(BaseMismatchError, match="the same parameter"):
        find_addresses(checkpoint, {*names, *names.values()}, "a")
