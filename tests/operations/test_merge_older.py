"""Adapters of older releases of peft, in which the same options mean something else or trained tensors are missing.

They are made by changing what the current release writes.
"""

import peft
import peft_adapters
import pytest
import tiny
from peft_adapters import Case
from safetensors.torch import load_file

from adaptkit.errors import BaseMismatchError
from adaptkit.operations.merge import MergeOptions, merge

TABLE = {"target_modules": ["embed_tokens", "q_proj"]}


def test_ensure_weight_tying_is_ignored_for_embeddings_trained_with_peft_0_18(tmp_path):
    base = tiny.write_llama(tmp_path / "base", tied=True)
    adapter = peft_adapters.write_adapter(tmp_path / "adapter", Case(tied=True, lora=TABLE), base)
    merge(base, [adapter], tmp_path / "expected", MergeOptions(untie=True))
    peft_adapters.change_config(adapter, peft_version="0.18.1", ensure_weight_tying=True)
    with pytest.raises(BaseMismatchError, match="and the two would differ"):
        merge(base, [adapter], tmp_path / "merged")
    merge(base, [adapter], tmp_path / "merged", MergeOptions(untie=True))
    expected, found = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("expected", "merged"))
    assert expected == found


def test_biases_that_older_releases_did_not_save_are_reported(tmp_path):
    case = peft_adapters.CASES["biases_lora_only"]  # one of its two modules has a bias
    base = peft_adapters.write_base(tmp_path / "base", case)
    adapter = peft_adapters.write_adapter(tmp_path / "adapter", case, base)
    report = merge(base, [adapter], tmp_path / "whole")
    assert not any("bias" in line for line in report.notes)

    def lose(tensors):
        for key in [key for key in tensors if key.endswith(".bias")]:
            del tensors[key]

    peft_adapters.change_tensors(adapter, lose)
    (said,) = [line for line in merge(base, [adapter], tmp_path / "merged").notes if "bias" in line]
    assert "q_proj" in said
    assert "o_proj" not in said
    plain, found = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert all(plain[key].equal(found[key]) for key in plain if key.endswith(".bias"))


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_changed_only_by_the_other_adapter_of_the_model_is_unchanged(tied, tmp_path):
    base = tiny.write_llama(tmp_path / "base", tied=tied)
    with peft_adapters.quiet():
        usual = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False}
        model = peft.get_peft_model(peft_adapters.load_float32(base), peft.LoraConfig(**usual | TABLE))
        model.save_pretrained(tmp_path / "alone")
        model.add_adapter("other", peft.LoraConfig(**usual | {"target_modules": ["lm_head"]}))
        model.save_pretrained(tmp_path / "beside", selected_adapters=["default"])
    assert any("lm_head.base_layer" in key for key in peft_adapters.keys_of(tmp_path / "beside"))
    merged = []
    for name in ("alone", "beside"):
        merge(base, [tmp_path / name], tmp_path / f"{name}-merged", MergeOptions(untie=tied))
        merged.append((tmp_path / f"{name}-merged" / "model.safetensors").read_bytes())
    assert merged[0] == merged[1]


@pytest.mark.parametrize("lora", [TABLE, {"trainable_token_indices": peft_adapters.TOKENS}])
def test_embeddings_trained_without_gemma_3s_scale_are_reported(lora, tmp_path):
    case = Case(family="gemma3_text", tied=True, lora=lora)
    base = peft_adapters.write_base(tmp_path / "base", case)
    adapter = peft_adapters.write_adapter(tmp_path / "adapter", case, base)
    for version, is_said in (("0.17.1", True), ("0.18.0", False)):
        peft_adapters.change_config(adapter, peft_version=version)
        report = merge(base, [adapter], tmp_path / version, MergeOptions(untie=True))
        assert any("embed_tokens without the factor √hidden_size" in line for line in report.notes) == is_said
