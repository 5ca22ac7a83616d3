"""Verdicts on adapters for programs that are not run here: their answers are written out; suggested commands are run.

``scripts/check_targets.py`` compares those for vLLM with vLLM itself.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft_adapters
import pytest
import tiny
import torch
from folders import edit_json
from safetensors.torch import load_file, save_file
from verdicts import UP, WEIGHTS, configure, levels, rewrite, taken, verdicts, words

from adaptkit.errors import AdaptkitError
from adaptkit.operations.check import check
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import quantize

ALL = {"gguf", "peft", "sglang", "vllm"}


@dataclass(frozen=True)
class Case:
    """An adapter and what programs say of it.

    Attributes:
        refusals: by program, a phrase of an error; no other programs than these refuse it.
        warnings: by program, a phrase of a warning.
        lora: arguments of peft's ``LoraConfig``.
        config: keys that are set in the saved configuration.
        tensors: a change of the saved tensors.
        on_base: whether the base is given.
    """

    refusals: Mapping[str, str] = field(default_factory=dict)
    warnings: Mapping[str, str] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    on_base: bool = False


def layer_more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add a layer that the base does not have."""
    return tensors | {name.replace("layers.1.", "layers.7."): tensor.clone() for name, tensor in tensors.items()}


IGNORED = {"sglang": "SGLang ignores this", "gguf": "ignores this; the adapter does not fit"}
PLAIN = {"sglang": "computes plain LoRA", "gguf": "computes plain LoRA"}
CASES = {
    "plain": Case(),
    "plain, with its base": Case(on_base=True),
    "rsLoRA": Case({"sglang": "silently scales everything", "gguf": "silently scales by"}, lora={"use_rslora": True}),
    "DoRA": Case(
        {"vllm": "vLLM rejects DoRA", "sglang": "SGLang rejects DoRA", "gguf": "fails on tensors other than"},
        lora={"use_dora": True},
    ),
    "bias of B": Case(
        {"vllm": "rejects a bias of lora_B", "sglang": "treats every tensor", "gguf": "fails on tensors other than"},
        lora={"lora_bias": True},
    ),
    "head and norms": Case(
        {"vllm": "rejects tensors that replace", "sglang": "does not support tensors", "gguf": "silently skips them"},
        lora={"modules_to_save": ["lm_head", "norm", "input_layernorm"]},
    ),
    "trained tokens": Case(
        {"vllm": "rejects trained token rows", "sglang": "does not support tensors", "gguf": "tensors other than"},
        lora={"trainable_token_indices": [1, 5]},
    ),
    "rank pattern": Case(
        {"sglang": "its buffers have one rank"}, {"vllm": "older versions silently scale"},
        lora={"rank_pattern": {"q_proj": 2}},
    ),
    "rank pattern of the same scaling": Case(
        {"sglang": "a rank other than r = 4", "gguf": "silently scales by"},
        lora={"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 4}},
    ),
    "alpha pattern": Case(
        {"sglang": "silently scales everything", "gguf": "silently scales by"}, {"vllm": "older versions silently"},
        lora={"alpha_pattern": {"layers.0.mlp.up_proj": 3}},
    ),
    "regular expression": Case(
        {"sglang": "accepts a list of names"}, lora={"target_modules": r".*layers\.\d+\..*_proj"}
    ),
    "tables": Case(
        {}, {"vllm": "if its implementation of the architecture lists them", "gguf": "give --base to find out"},
        lora={"target_modules": ["embed_tokens", "lm_head", "q_proj", "v_proj"]},
    ),
    "tables of an untied Llama": Case(
        lora={"target_modules": ["embed_tokens", "lm_head", "q_proj", "v_proj"]}, on_base=True
    ),
    "tables that are not targets": Case(
        {"sglang": "silently drops it", "peft": "creates no LoRA there"},
        lora={"target_modules": ["embed_tokens", "q_proj", "v_proj"]}, config={"target_modules": ["q_proj", "v_proj"]},
    ),
    "PiSSA": Case({"vllm": "vLLM rejects init", **IGNORED}, config={"init_lora_weights": "pissa_niter_4"}),
    "LoRA-GA": Case({"vllm": "vLLM ignores this", **IGNORED}, config={"init_lora_weights": "lora_ga"}),
    "gaussian": Case(config={"init_lora_weights": "gaussian"}),
    "unknown start": Case(
        {"vllm": "vLLM rejects unknown values", "peft": "init_lora_weights is 'milora'"},
        {"sglang": "init_lora_weights is 'milora'", "gguf": "init_lora_weights is 'milora'"},
        config={"init_lora_weights": "milora"},
    ),
    "activated LoRA": Case(
        {"vllm": "rejects activated LoRA", "sglang": "computes plain LoRA"}, config={"alora_invocation_tokens": [3, 4]}
    ),
    "replicated layers": Case(
        {"vllm": "rejects layer replication", **PLAIN}, config={"layer_replication": [[0, 2], [1, 2]]}
    ),
    "Arrow": Case({"vllm": "computes plain LoRA", **PLAIN}, config={"arrow_config": {"top_k": 3}}),
    "biases": Case({"vllm": "rejects trained biases"}, config={"bias": "all"}),
    "a flag of GPT-2": Case(config={"fan_in_fan_out": True}),
    "lost magnitudes": Case(
        {"vllm": "rejects DoRA", "sglang": "rejects DoRA", "gguf": "does not notice", "peft": "has no magnitude"},
        config={"use_dora": True},
    ),
    "lost head": Case(
        {"vllm": "modules_to_save is ['lm_head']", "gguf": "does not notice", "peft": "KeyError"},
        config={"modules_to_save": ["lm_head"]},
    ),
    "lost classifier": Case({"gguf": "does not notice"}, config={"modules_to_save": ["score"], "task_type": "SEQ_CLS"}),
    "classifier": Case(
        {"sglang": "does not support tensors", "gguf": "tensors other than"}, {"vllm": "--runner pooling"},
        config={"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
        tensors=lambda t: t | {f"base_model.model.score.{part}": torch.ones(3, 64) for part in ("weight", "bias")},
    ),
    "alpha of zero": Case(
        {"vllm": "rejects them", "sglang": "fails when it computes", "gguf": "fails without lora_alpha"},
        {"peft": "changes nothing"}, config={"lora_alpha": 0},
    ),
    "no targets": Case(
        {"vllm": "target_modules is missing", "sglang": "accepts a list", "peft": "target_modules is not set"},
        config={"target_modules": "remove"},
    ),
    "all-linear": Case(config={"target_modules": "all-linear"}),
    "fused targets": Case(
        {"peft": "creates no LoRA"}, config={"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
    ),
    "a target less": Case(
        {"sglang": "does not name model.layers.0.mlp.gate_proj and 3 more", "peft": "creates no LoRA"},
        config={"target_modules": ["qkv_proj", "o_proj", "down_proj"]}, on_base=True,
    ),
    "another type": Case(
        {"vllm": "vLLM ignores this", "sglang": "rejects every type", "gguf": "ignores this"},
        config={"peft_type": "IA3"},
    ),
    "unknown key": Case(warnings=dict.fromkeys(ALL, "future_config"), config={"future_config": {"x": 1}}),
    "no base named": Case(warnings={"gguf": "needs the base's config.json"}, config={"base_model_name_or_path": None}),
    "rank 16": Case(lora={"rank": 16}),
    "rank 17": Case(warnings={"vllm": "--max-lora-rank 32,"}, lora={"rank": 17}),
    "rank 400": Case(warnings={"vllm": "--max-lora-rank 512,"}, lora={"rank": 400}),
    "rank 513": Case({"vllm": "--rank 512"}, lora={"rank": 513}),
    "rank of no module": Case(
        warnings={"vllm": "--max-lora-rank 64,"}, config={"rank_pattern": {"nowhere": 64}}
    ),
    "too large a rank of no module": Case({"vllm": "rank 1024"}, config={"rank_pattern": {"nowhere": 1024}}),
    "q and v": Case(lora={"target_modules": ["q_proj", "v_proj"]}),
    "q and k": Case({"sglang": "q_proj without v_proj"}, lora={"target_modules": ["q_proj", "k_proj"]}),
    "v": Case({"sglang": "without q_proj"}, lora={"target_modules": ["v_proj"]}),
    "up": Case(warnings={"sglang": "up_proj without gate_proj"}, lora={"target_modules": ["up_proj", "down_proj"]}),
    "up, with a base that has gates": Case(
        {"sglang": "up_proj without gate_proj"}, lora={"target_modules": ["up_proj", "down_proj"]}, on_base=True
    ),
    "a layer more": Case(
        {"sglang": "no tensor of", "gguf": "no tensor of", "peft": "no tensor of"},
        {"vllm": "silently drops these tensors"}, tensors=layer_more, on_base=True,
    ),
    "layers of another name": Case(
        dict.fromkeys(ALL, "no tensor of"), on_base=True,
        tensors=lambda t: {name.replace(".layers.", ".blocks.layers."): tensor for name, tensor in t.items()},
    ),
    "a bias of B that no key names": Case(
        {"vllm": "cannot parse", "sglang": "treats every tensor", "gguf": "tensors other than", "peft": "drops it"},
        tensors=lambda t: t | {f"{UP}.lora_B.bias": torch.ones(128)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_program_answers_as_its_table_says(name, make, untied):
    case = CASES[name]
    folder = make(**case.lora)
    configure(folder, **case.config)
    if case.tensors is not None:
        rewrite(folder, case.tensors)
    found = verdicts(folder, untied if case.on_base else None)
    assert {program for program, verdict in found.items() if not verdict.taken} == set(case.refusals)
    for program, verdict in found.items():
        if program in case.refusals:
            assert levels(verdict, case.refusals[program]) == {"error"}, program
        if program in case.warnings:
            assert levels(verdict, case.warnings[program]) == {"warning"}, program
        assert verdict.findings or program not in {*case.refusals, *case.warnings}
        assert all(finding.change for finding in verdict.findings)


@pytest.mark.parametrize(
    ("family", "module", "level"),
    [
        ("LlamaForCausalLM", "embed_tokens", set()),
        ("Qwen3ForCausalLM", "lm_head", set()),
        ("Qwen2ForCausalLM", "embed_tokens", {"error"}),
        ("MistralForCausalLM", "lm_head", {"error"}),
        ("UnknownForCausalLM", "lm_head", {"warning"}),
    ],
)
def test_vllm_takes_tables_only_for_models_that_list_them(family, module, level, make, untied, copy_of):
    """As vLLM 0.32 did in ``scripts/check_targets.py``."""
    folder, base = make(target_modules=[module, "q_proj", "v_proj"]), copy_of(untied)
    edit_json(base / "config.json", architectures=[family])
    assert levels(verdicts(folder, base, ["vllm"])["vllm"], "embedding or head") == level


def test_a_head_of_another_name_is_an_error_for_vllm(make):
    folder = make(target_modules=["lm_head", "q_proj", "v_proj"])
    rewrite(folder, lambda t: {name.replace("lm_head", "embed_out"): tensor for name, tensor in t.items()})
    assert levels(verdicts(folder)["vllm"], "embed_out: embedding or head") == {"error"}


@pytest.mark.parametrize(("size", "level"), [(258_048, set()), (258_049, {"error"})])
def test_vllm_limits_the_vocabulary_of_an_adapted_head(size, level, make, untied, copy_of):
    head, base = make(target_modules=["lm_head", "q_proj", "v_proj"]), copy_of(untied)
    edit_json(base / "config.json", vocab_size=size)
    assert levels(verdicts(head, base)["vllm"], "lm_head with a vocabulary") == level


def test_only_peft_accepts_adapters_of_gpt2(tmp_path, gpt2):
    folder = tiny.write_peft_adapter(tmp_path / "of-gpt2", gpt2)
    for base in (gpt2, None):
        assert taken(folder, base) == {"peft"}
    assert levels(verdicts(folder, gpt2)["vllm"], "vLLM's GPT-2 does not support adapters") == {"error"}
    assert levels(verdicts(folder, gpt2)["gguf"], "transposes A and B") == {"error"}
    assert levels(verdicts(folder, gpt2)["sglang"], "looks for layers.N.") == {"error"}


@pytest.mark.parametrize(
    ("kind", "loads"),
    [
        ("experts_one_by_one_mixtral_fused", True),
        ("experts_one_by_one_qwen3", True),
        ("experts_one_by_one_rslora", False),
        ("experts_one_by_one_qwen2", False),
    ],
)
def test_adapters_of_single_experts_are_judged_as_each_program_loads_them(kind, loads, made):
    """``loads``, from the fixture, is whether peft loads all of it."""
    case = peft_adapters.make(made, kind)
    assert case.case.loads == loads
    found = verdicts(case.adapter, case.base)
    assert found["peft"].taken == loads
    assert found["vllm"].taken
    assert levels(found["sglang"], "--lora-target-modules all") == {"warning"}


def test_only_peft_and_vllm_with_options_accept_stacks_of_experts(made, untied):
    both, one = (peft_adapters.make(made, kind) for kind in ("experts_patterns", "experts_up_only"))
    assert taken(both.adapter, both.base) == {"peft", "vllm"}
    assert levels(verdicts(both.adapter, both.base)["vllm"], "--enable-mixed-moe-lora-format") == {"warning"}
    assert levels(verdicts(both.adapter)["sglang"], "stack of experts") == {"error"}
    assert taken(one.adapter, one.base) == {"peft"}
    assert levels(verdicts(both.adapter, untied)["peft"], "experts and 3 more: no tensor of this name in") == {"error"}


def test_modules_and_shapes_are_compared_with_the_base(make, tmp_path, gpt2):
    folder, wide = make(), tiny.write_llama(tmp_path / "wide", hidden=128)
    for other, phrase in ((wide, "down_proj is [128, 256]"), (gpt2, "no tensor of")):
        assert all(levels(verdict, phrase) == {"error"} for verdict in verdicts(folder, other).values())


def test_modules_of_rank_zero_have_to_be_made_again(make):
    """mergekit-extract-lora writes them; peft could not save such an adapter again."""
    folder, module = make(rank_pattern={"layers.1.self_attn.q_proj": 2}), "layers.1.self_attn.q_proj"
    configure(folder, rank_pattern={module: 0})
    empty = {"A": lambda tensor: tensor[:0], "B": lambda tensor: tensor[:, :0]}
    rewrite(
        folder,
        lambda t: {key: empty[key.split("lora_")[1][0]](v) if module in key else v for key, v in t.items()},
    )
    for verdict in verdicts(folder).values():
        assert levels(verdict, "rank of at least 1") == {"error"}
        assert not levels(verdict, "save the adapter again with peft")


def test_sglang_would_load_a_compensation_file(make):
    folder = make()
    shutil.copy(folder / WEIGHTS, folder / "adaptkit-compensation.safetensors")
    assert taken(folder) == ALL - {"sglang"}
    assert levels(verdicts(folder)["sglang"], "adaptkit-compensation.safetensors beside") == {"error"}


def test_tokens_added_to_the_vocabulary_are_an_error_for_sglang(make, untied):
    folder, size = make(), json.loads((untied / "config.json").read_text())["vocab_size"]
    (folder / "added_tokens.json").write_text(json.dumps({"<old>": size - 1}))
    assert levels(verdicts(folder)["sglang"], "<old>") == {"warning"}
    assert verdicts(folder, untied)["sglang"].findings == ()
    (folder / "added_tokens.json").write_text(json.dumps({"<old>": size - 1, "<new>": size}))
    assert levels(verdicts(folder, untied)["sglang"], ": <new>") == {"error"}


def test_a_quantized_base_is_compared_by_the_shapes_of_its_original_weights(make, untied, tmp_path):
    quantize(untied, tmp_path / "nf4")
    folder = make()
    assert taken(folder, tmp_path / "nf4") == ALL - {"gguf"}
    assert levels(verdicts(folder, tmp_path / "nf4")["gguf"], "16-bit checkpoint") == {"error"}


def suggested(verdict, **paths):
    """Return the arguments of the adaptkit commands that a verdict's findings suggest."""
    texts = {match for f in verdict.findings for match in re.findall(r"adaptkit ((?:merge|resize) [^,;]*)", f.change)}
    return [[paths.get(word, word) for word in text.split()] for text in texts]


@pytest.mark.parametrize(
    ("change", "program"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, "gguf"),
        ({"target_modules": ["lm_head", "q_proj"]}, "gguf"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "vllm"),
    ],
)
def test_the_suggested_merge_works_on_a_base_with_a_tied_head(change, program, make, llama, untied, run_cli, tmp_path):
    """Tried with llama.cpp: it refuses LoRA of such a head, and with LoRA of the embedding it aborts at the head."""
    folder = make(llama, **change)
    verdict = verdicts(folder, llama)[program]
    assert not verdict.taken
    commands = suggested(verdict, BASE=llama, MERGED=tmp_path / "merged")
    assert commands
    for command in commands:
        assert run_cli(*command, "--force").code == 0
    assert "--untie" in words(verdicts(folder)[program])
    assert "--untie" not in words(verdicts(folder, untied)[program])  # which has no use for it


def test_the_suggested_resize_turns_rslora_into_plain_lora_unless_a_merge_is_needed(make, tmp_path, untied, run_cli):
    folder = make(use_rslora=True)
    (command,) = suggested(verdicts(folder)["sglang"], OUT=tmp_path / "plain")
    assert command[0] == "resize"
    assert run_cli(*command).code == 0
    assert taken(tmp_path / "plain", untied) == ALL
    for other in (make(name="a", alpha_pattern={"q_proj": 3}), make(name="b", use_rslora=True, use_dora=True)):
        assert {command[0] for command in suggested(verdicts(other)["gguf"])} == {"merge"}


def test_an_mlx_adapter_gets_one_finding_whose_conversion_equals_fusing_in_mlx(tmp_path, untied):
    """An adapter as mlx-lm 0.32 writes it, and the same one converted as the hint says."""
    generator, name, rank, scale = torch.Generator().manual_seed(0), "model.layers.0.mlp.up_proj", 8, 20.0
    weight = load_file(untied / "model.safetensors")[f"{name}.weight"].float()
    out, into = weight.shape
    a, b = (torch.randn(shape, generator=generator) / 10 for shape in ((into, rank), (rank, out)))
    mlx, converted = tmp_path / "mlx", tmp_path / "converted"
    halves = {f"{UP}.lora_A.weight": a.T.contiguous(), f"{UP}.lora_B.weight": b.T.contiguous()}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": rank, "scale": scale}}
    of_peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": scale * rank}
    of_peft["target_modules"] = ["up_proj"]
    write(mlx, config, "adapters.safetensors", {f"{name}.lora_a": a, f"{name}.lora_b": b})
    write(converted, of_peft, WEIGHTS, halves)
    for verdict in check(mlx, base=untied).verdicts:
        (finding,) = verdict.findings
        assert (verdict.taken, finding.level) == (False, "error")
        with pytest.raises(AdaptkitError, match="an MLX adapter") as refused:
            merge(untied, [mlx], tmp_path / "merged")
        assert finding.change == refused.value.hint
    assert verdicts(converted, untied)["peft"].taken
    merge(untied, [converted], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"].float()
    fused = weight + (scale * b.T) @ a.T  # as mlx_lm.fuse does
    assert torch.allclose(merged, fused, rtol=1e-2, atol=1e-2)


def write(folder: Path, config: Mapping[str, Any], file: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write an adapter's folder."""
    folder.mkdir()
    save_file(tensors, folder / file)
    (folder / "adapter_config.json").write_text(json.dumps(config))
