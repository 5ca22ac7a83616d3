"""An adapter with module names of older transformers releases is loaded, or refused with the reason."""

import json

import pytest
import tiny
import torch
from safetensors.torch import save_file

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.errors import AdapterError, BaseMismatchError
from adaptkit.training.network.loading import load_adapter
from adaptkit.training.network.model import load_model

CPU = torch.device("cpu")
TOWER = "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
TOWER_TODAY = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
TEXT = "model.language_model.layers.1.self_attn.q_proj"


def written(folder, shapes):
    """Write an adapter of rank 2 for modules of shape (out, in), without the version of peft that wrote it."""
    folder.mkdir()
    tensors = {}
    for module, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "w1"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return read_adapter(folder)


def test_an_adapter_with_module_names_of_transformers_4_is_loaded(tmp_path):
    model = load_model(tiny.write_llava(tmp_path / "base", older=True), torch.float32, CPU)
    adapter = written(tmp_path / "adapter", {TOWER: (32, 32), TEXT: (64, 64)})
    load_adapter(model, adapter)
    assert set(model.adapted()) == {TOWER_TODAY, TEXT}
    for said, today in {TOWER: TOWER_TODAY, TEXT: TEXT}.items():
        assert torch.equal(model.linears[today].lora_a, adapter.modules[said].lora_a)


def test_an_adapter_that_names_one_module_in_two_ways_is_refused(tmp_path):
    model = load_model(tiny.write_llava(tmp_path / "base", older=True), torch.float32, CPU)
    adapter = written(tmp_path / "adapter", {TOWER: (32, 32), TOWER_TODAY: (32, 32)})
    with pytest.raises(AdapterError, match="names of several releases"):
        load_adapter(model, adapter)


def test_the_error_for_an_adapter_on_a_single_expert_suggests_merging(tmp_path):
    """transformers 4 had a linear layer for every expert's matrix, as the files have."""
    model = load_model(tiny.write_family(tmp_path / "base", "mixtral"), torch.float32, CPU)
    adapter = written(tmp_path / "adapter", {"model.layers.0.block_sparse_moe.experts.1.w1": (128, 64)})
    with pytest.raises(BaseMismatchError, match=r"experts\.1\.w1, for which .* has no linear layer") as refused:
        load_adapter(model, adapter)
    assert "merge" in refused.value.hint
