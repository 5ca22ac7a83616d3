"""Checks of the reference that others are compared with: what the fixtures contain, and what peft computes.

adaptkit is not used here. These tests fail if peft or transformers change the meaning of their files.
"""

import functools
import json
import re
import shutil

import peft_adapters
import peft_formulas
import pytest
import torch
from peft_adapters import CASES, CONFIG, PREFIX, TOKENS, WEIGHTS
from safetensors.torch import load_file, save_file

LOADED = [name for name, case in CASES.items() if case.loads]
TOLERANCE = 2e-6
"""Relative to the largest logit or weight; peft computes in float32."""


def keys_of_first_layer(case):
    """The keys of an adapter, without their prefix and without those of later layers."""
    keys = (key.removeprefix(PREFIX) for key in peft_adapters.keys_of(case.adapter))
    return {key for key in keys if ".layers.1." not in key and ".h.1." not in key}


@pytest.mark.parametrize("name", CASES)
def test_no_tensor_of_an_adapter_is_zero(judged, name):
    case, _ = judged(name)
    for key, tensor in load_file(case.adapter / WEIGHTS).items():
        assert tensor.dtype == getattr(torch, case.case.dtype)
        assert tensor.abs().max() > 1e-3, key


@pytest.mark.parametrize("name", LOADED)
def test_peft_loads_every_tensor_of_an_adapter(judged, name):
    _, judgement = judged(name)
    tied = r"lm_head\.(base_layer\.)?token_adapter\.trainable_tokens_delta"  # of a tied head
    assert [key for key in judgement.missing if not re.search(tied, key)] == []
    copies = tuple(f".{copy}.{kind}" for copy in ("original_module", "modules_to_save") for kind in ("weight", "bias"))
    assert [key for key in judgement.unexpected if not re.search(tied, key) and not key.endswith(copies)] == []


@functools.cache
def logits_of_base(base):
    with peft_adapters.quiet(), torch.no_grad():
        return peft_adapters.load_float32(base)(peft_formulas.tokens(peft_adapters.SMALLER_VOCABULARY)).logits


@pytest.mark.parametrize("name", LOADED)
def test_the_formulas_give_the_logits_of_the_unmerged_model(tmp_path, judged, name):
    from transformers import AutoModelForCausalLM

    case, judgement = judged(name)
    tensors = peft_formulas.merged(judgement.files, [judgement.changes])
    untied = peft_formulas.HEAD in tensors and peft_formulas.HEAD not in judgement.files
    assert untied == case.case.untied
    folder = tmp_path / "merged"
    shutil.copytree(case.base, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file(
        {name: tensor.float() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"tie_word_embeddings": False} if untied else {}
    config |= {"vocab_size": case.case.vocabulary} if case.case.vocabulary else {}
    (folder / "config.json").write_text(json.dumps(config))
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with peft_adapters.quiet(), torch.no_grad():
        logits = model.eval()(peft_formulas.tokens(case.case.vocabulary)).logits
    assert (logits - judgement.logits).abs().max() < TOLERANCE * judgement.logits.abs().max()
    plain = logits_of_base(case.base)
    shared = judgement.logits[:, : plain.shape[1], : plain.shape[2]]
    assert (shared - plain[:, : shared.shape[1], : shared.shape[2]]).abs().max() > 0.01 * plain.abs().max()


@pytest.mark.parametrize("name", [name for name in LOADED if not CASES[name].tied and CASES[name].family != "gpt2"])
def test_the_formulas_give_the_weights_that_peft_merges_if_no_head_is_tied(judged, name):
    """peft's merge adds a tied head's change to the embedding, and the other way round; see the next test."""
    case, judgement = judged(name)
    expected = peft_formulas.merged(judgement.files, [judgement.changes])
    model = peft_formulas.running(case.base, case.adapter, case.case.vocabulary)
    with peft_adapters.quiet():
        theirs = model.merge_and_unload().state_dict()
    seen = set()
    for parameter, tensor in theirs.items():
        for file_name, take in peft_formulas.places(parameter, judgement.files).items():
            seen.add(file_name)
            difference = (take(tensor).double() - expected[file_name]).abs().max()
            assert difference < TOLERANCE * expected[file_name].abs().max(), file_name
    assert seen == set(expected)


@pytest.mark.parametrize(
    "name", ["embedding_tied", "head_tied", "embedding_tied_ensured", "tokens_head_tied", "tokens_both_tied"]
)
def test_with_a_tied_head_pefts_merged_and_unmerged_models_differ(judged, name):
    case, judgement = judged(name)
    model = peft_formulas.running(case.base, case.adapter)
    with peft_adapters.quiet(), torch.no_grad():
        logits = model.merge_and_unload()(peft_formulas.tokens()).logits
    assert (logits - judgement.logits).abs().max() > 0.01 * judgement.logits.abs().max()


def test_rounded_once_agrees_with_torch_where_torch_rounds_once():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(-46, 16, dtype=torch.float64).repeat_interleave(200)
    values = torch.randn(exponents.shape, dtype=torch.float64, generator=generator) * torch.pow(2.0, exponents)
    assert torch.equal(peft_formulas.rounded_once(values, torch.float32), values.float())
    exact = values.float()  # from float32 torch rounds once; from float64 it goes through float32
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(peft_formulas.rounded_once(exact.double(), dtype), exact.to(dtype))
    above_a_tie = torch.tensor([1 + 2**-11 + 2**-40], dtype=torch.float64)  # float32 lacks the last bit
    assert peft_formulas.rounded_once(above_a_tie, torch.float16).item() == 1 + 2**-10


LORA = {"model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_B.weight"}
EXPERTS = "model.layers.0.mlp.experts"
KEYS = {
    "linear_mica": LORA,
    "embedding": LORA
    | {f"model.embed_tokens.{part}" for part in ("base_layer.weight", "lora_embedding_A", "lora_embedding_B")},
    "embedding_tied_ensured": LORA
    | {f"model.embed_tokens.{part}" for part in ("base_layer.weight", "lora_embedding_A", "lora_embedding_B")}
    | {f"lm_head.{part}" for part in ("base_layer.weight", "lora_A.weight", "lora_B.weight")},
    "embedding_head_tied_ensured": LORA  # without the bases
    | {f"model.embed_tokens.{part}" for part in ("lora_embedding_A", "lora_embedding_B")}
    | {f"lm_head.{part}" for part in ("lora_A.weight", "lora_B.weight")},
    "dora_embedding": LORA
    | {"model.layers.0.self_attn.q_proj.lora_magnitude_vector"}
    | {
        f"model.embed_tokens.{part}"
        for part in ("base_layer.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    },
    "biases_lora_only": LORA
    | {f"model.layers.0.self_attn.o_proj.lora_{half}.weight" for half in "AB"}
    | {"model.layers.0.self_attn.q_proj.base_layer.bias"},
    "saved_norms": LORA
    | {f"model.layers.0.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
    | {"model.norm.weight"},
    "saved_tied_ensured": LORA | {"model.embed_tokens.weight", "lm_head.weight"},
    "resized_tied": LORA | {"model.embed_tokens.weight", "lm_head.weight"},
    "resized_saved": LORA
    | {
        f"{module}.{part}weight"
        for module in ("model.embed_tokens", "lm_head")
        for part in ("", "modules_to_save.", "original_module.")
    },
    "resized_head_tied": {f"lm_head.{part}" for part in ("base_layer.weight", "lora_A.weight", "lora_B.weight")},
    "resized_phi": LORA
    | {f"model.layers.0.{m}.lora_{h}.weight" for m in ("self_attn.dense", "mlp.fc2") for h in "AB"}
    | {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"},
    "tokens_tied": LORA | {"model.embed_tokens.token_adapter.trainable_tokens_delta"},
    "tokens_resized_tied": LORA
    | {
        f"{module}.token_adapter.{part}"
        for module in ("model.embed_tokens", "lm_head")
        for part in ("base_layer.weight", "trainable_tokens_delta")
    },
    "experts_mixtral": LORA | {f"{EXPERTS}.{inner}lora_{h}.weight" for inner in ("", "base_layer.") for h in "AB"},
    "experts_up_only": LORA | {f"{EXPERTS}.lora_{half}.weight" for half in "AB"},
    "experts_down_only": LORA | {f"{EXPERTS}.lora_{half}.weight" for half in "AB"},
    "experts_saved": LORA | {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"},
    "router": LORA | {f"model.layers.0.mlp.gate.lora_{half}.weight" for half in "AB"},
    "router_saved": LORA | {"model.layers.0.mlp.gate.weight"},
    "router_and_shared_gate_saved": LORA
    | {"model.layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_expert_gate.weight"},
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_peft_writes_these_keys(judged, name):
    assert keys_of_first_layer(judged(name)[0]) == KEYS[name]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("conv1d_with_head", {"fan_in_fan_out": False}),  # though c_attn is stored (in, out)
        ("tokens_both", {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [3, 1]}}),
        ("tokens", {"trainable_token_indices": TOKENS}),
        ("saved_tied_ensured", {"modules_to_save": ["embed_tokens", "model.embed_tokens"]}),
        ("linear_mica", {"init_lora_weights": "mica"}),
        ("experts_by_old_names", {"rank_pattern": {r".*\.gate_up_proj": 8}, "target_modules": ["q_proj"]}),
        ("resized", {"r": 4, "modules_to_save": None}),  # nothing in it shows that the vocabulary was resized
    ],
)  # fmt: skip
def test_peft_writes_this_configuration(judged, name, says):
    config = json.loads((judged(name)[0].adapter / CONFIG).read_text())
    assert {key: config[key] for key in says} == says


def test_the_rank_of_an_experts_adapter_is_per_expert(judged):
    case, _ = judged("experts_patterns")
    tensors = load_file(case.adapter / WEIGHTS)
    inner = tensors[f"{PREFIX}{EXPERTS}.base_layer.lora_A.weight"]  # gate_up_proj, rank 3, 4 experts
    outer = tensors[f"{PREFIX}{EXPERTS}.lora_A.weight"]  # down_proj, rank 4
    assert (inner.shape[0], outer.shape[0]) == (3 * 4, 4 * 4)


def test_peft_does_not_load_experts_saved_one_by_one_for_some_models(judged):
    """So their meaning can be checked only by their keys."""
    case, judgement = judged("experts_one_by_one_qwen2")
    model = peft_formulas.running(case.base, case.adapter)
    assert len(peft_formulas.changes(model, judgement.files)) == 2
    assert len(judgement.changes) == 2 + 2 * 4 * 3


def test_with_rslora_peft_scales_experts_saved_one_by_one_by_too_much(judged):
    case, judgement = judged("experts_one_by_one_rslora")
    theirs = peft_formulas.changes(peft_formulas.running(case.base, case.adapter), judgement.files)
    assert set(theirs) == set(judgement.changes)
    for name, change in judgement.changes.items():
        factor = 2**0.5 if "gate_proj" in name or "up_proj" in name else 1.0
        assert theirs[name].scaling == pytest.approx(factor * change.scaling)
        assert torch.equal(theirs[name].inner, change.inner)
