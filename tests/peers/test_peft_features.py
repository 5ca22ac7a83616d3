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
from peft_adapters import CASES, PREFIX, WEIGHTS
from safetensors.torch import load_file, save_file

LOADED = [name for name, case in CASES.items() if case.loads]
TOLERANCE = 2e-6
"""Relative to the largest logit or weight; peft computes in float32."""


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


EXPERTS = "model.layers.0.mlp.experts"


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
