"""Verdicts on adapters of single experts, which peft converts to stacks, are compared with what peft does."""

import itertools
import json
import re

import peft_adapters
import pytest
import tiny
import torch
from folders import edit_json, edited_tensors
from safetensors.torch import load_file, save_file

from adaptkit.operations.check import check
from adaptkit.operations.merge import merge

SINGLE = {
    "all": {},
    "by a pattern": {"targets": r".*experts\.\w+"},
    "by a pattern with numbers": {"targets": r".*experts\.\d+\.\w+"},
    "gate and up": {"parts": "gate up"},
    "down": {"parts": "down"},
    "gate": {"parts": "gate"},
    "up and down": {"parts": "up down"},
    "some experts": {"without": r"experts\.[23]\."},
    "some experts' down": {"without": r"experts\.3\.(down_proj|w2)"},
    "one layer": {"without": r"layers\.1\."},
    "one layer, and of the other gate and up": {"without": r"layers\.1\..*(down_proj|w2)"},
    "one layer, and of the other gate": {"without": r"layers\.1\..*(down_proj|w2|up_proj|w3)"},
    "a rank of its own for gate": {"ranks": {"gate": 2}},
    "a rank of its own for down": {"ranks": {"down": 2}},
    "a rank of their own for all": {"ranks": {"gate": 2, "up": 2, "down": 2}},
    "an alpha of its own for up": {"alpha": "up"},
}


def write_single_experts(
    folder, base, family, parts="gate up down", without=r"(?!)", ranks=(), alpha=None, targets=None
):
    """Write an adapter of single experts; ranks and alphas other than r and lora_alpha are listed by full path."""
    names = ("gate_proj", "up_proj", "down_proj") if family == "qwen3_moe" else ("w1", "w3", "w2")
    config = json.loads((base / "config.json").read_text())
    hidden, inter = config["hidden_size"], config.get("moe_intermediate_size") or config["intermediate_size"]
    leaves = dict(zip(("gate", "up", "down"), names, strict=True))
    tensors, patterns, alphas = {}, {}, {}
    for layer, expert, part in itertools.product(range(2), range(4), parts.split()):
        module = f"model.layers.{layer}.{'mlp' if family == 'qwen3_moe' else 'block_sparse_moe'}.experts.{expert}"
        module = f"{module}.{leaves[part]}"
        if re.search(without, module):
            continue
        rank = dict(ranks).get(part, 4)
        into, out = (inter, hidden) if part == "down" else (hidden, inter)
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, into) * 0.1
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank) * 0.1
        if rank != 4:
            patterns[module] = rank
        if part == alpha:
            alphas[module] = 8
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "rank_pattern": patterns}
    values |= {"alpha_pattern": alphas, "target_modules": targets or [leaves[part] for part in parts.split()]}
    values |= {"base_model_name_or_path": str(base), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    root = tmp_path_factory.mktemp("moe")
    return {family: tiny.write_family(root / family, family, dtype="float32") for family in ("mixtral", "qwen3_moe")}


@pytest.mark.parametrize(("case", "family"), list(zip(SINGLE, itertools.cycle(["mixtral", "qwen3_moe"]), strict=False)))
def test_single_experts_are_accepted_where_they_can_be_joined(case, family, moe, tmp_path):
    """What peft merges is compared with what ``merge`` makes of the same adapter.

    vLLM's ``PackedLoRALayerWeights.pack_moe`` asserts that all are present; llama.cpp's converter counts them.
    """
    from peft import PeftModel

    base = moe[family]
    folder = write_single_experts(tmp_path / "adapter", base, family, **SINGLE[case])
    merge(base, [folder], tmp_path / "merged")
    try:
        with peft_adapters.quiet():
            merged = PeftModel.from_pretrained(model(base), folder).merge_and_unload().state_dict()
    except (KeyError, RuntimeError, ValueError):  # KeyError: transformers 5.6
        loads = False
    else:
        expected = model(tmp_path / "merged").state_dict()
        loads = all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in expected)
    layers = [name.split(".")[4] for name in load_file(folder / "adapter_model.safetensors") if "lora_A" in name]
    whole = all(layers.count(layer) == 4 * 3 for layer in set(layers))
    gguf, of_peft, vllm = check(folder, ["gguf", "peft", "vllm"], base).verdicts
    assert of_peft.taken == loads
    assert vllm.taken == whole
    assert gguf.taken == (whole and "alpha" not in SINGLE[case])


@pytest.mark.parametrize(("parts", "level"), [("gate up", None), ("gate down", None), ("up down", "error")])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_sglang_needs_an_experts_gate_if_its_up_is_adapted(parts, level, family, moe, tmp_path):
    """It replaces a missing up by zeros, but does not recognize an up without a gate."""
    folder = write_single_experts(tmp_path / "adapter", moe[family], family, parts=parts)
    for base, found in ((moe[family], level), (None, level and "warning")):  # a model may have no gate
        (verdict,) = check(folder, ["sglang"], base).verdicts
        assert [f.level for f in verdict.findings if "without gate_proj" in f.found] == ([found] if found else [])


@pytest.mark.parametrize("target", ["gguf", "vllm"])
def test_experts_of_different_ranks_are_an_error(target, moe, tmp_path):
    folder = write_single_experts(tmp_path / "adapter", moe["mixtral"], "mixtral")
    edit_json(folder / "adapter_config.json", rank_pattern={r"0\.w1": 2})
    with edited_tensors(folder / "adapter_model.safetensors") as tensors:
        for name in [name for name in tensors if "experts.0.w1.lora_A" in name]:
            other = name.replace("lora_A", "lora_B")
            tensors[name], tensors[other] = tensors[name][:2].contiguous(), tensors[other][:, :2].contiguous()
    for base in (None, moe["mixtral"]):
        (verdict,) = check(folder, [target], base).verdicts
        assert [finding.found for finding in verdict.findings if finding.level == "error"] == [
            "model.layers.0.block_sparse_moe.experts and 1 more: experts with different ranks"
        ]


@pytest.mark.parametrize(("name", "loads"), [("gate", False), ("shared_expert_gate", True)])
def test_peft_does_not_support_lora_of_routers(name, loads, tmp_path):
    """Since transformers 5 routers are not linear layers; the shared expert's gate still is."""
    from peft import PeftModel

    base = tiny.write_family(tmp_path / "base", "qwen2_moe", dtype="float32")
    folder = tmp_path / "adapter"
    folder.mkdir()
    module, rows = f"base_model.model.model.layers.1.mlp.{name}", 1 if loads else 4
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 64), f"{module}.lora_B.weight": torch.ones(rows, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "bias": "none"}
    values |= {"base_model_name_or_path": str(base), "target_modules": [f"1.mlp.{name}"]}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    (verdict,) = check(folder, ["peft"], base).verdicts
    assert verdict.taken == loads
    if loads:
        PeftModel.from_pretrained(model(base), folder)
        return
    with pytest.raises(ValueError, match=r"Router.* is not supported"):
        PeftModel.from_pretrained(model(base), folder)


def test_lora_of_a_dense_mlp_together_with_experts_is_an_error_for_peft(moe, tmp_path):
    """peft mistakes the names of its modules for those of the stacks of experts."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(moe["qwen3_moe"], mlp_only_layers=[0], dtype=torch.float32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    folder = write_single_experts(tmp_path / "adapter", tmp_path / "base", "qwen3_moe", without=r"layers\.0\.")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.down_proj"
    tensors |= {
        f"{name}.lora_A.weight": torch.randn(4, config.intermediate_size),
        f"{name}.lora_B.weight": torch.randn(config.hidden_size, 4),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    with peft_adapters.quiet():
        merged = PeftModel.from_pretrained(model(tmp_path / "base"), folder).merge_and_unload().state_dict()
    unchanged = model(tmp_path / "base").state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(merged[name], unchanged[name])
    (verdict,) = check(folder, ["peft"], tmp_path / "base").verdicts
    assert [finding.found for finding in verdict.findings if "not an expert" in finding.found]
    assert not verdict.taken
