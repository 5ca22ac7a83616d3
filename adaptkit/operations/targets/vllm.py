"""vLLM 0.33.0 (November 2026): its LoRA loader and model loader.

``vllm/lora/peft_helper.py`` checks the configuration, ``lora_model.py`` and ``utils.py`` the names of tensors, and
``config/lora.py`` the ranks; ``model_manager.py`` handles experts; ``model_loader/default_loader.py`` finds the files
of a checkpoint. Version differences: from 0.32 on, rank and alpha patterns apply, and initializations that change the
base are rejected; in 0.28, bitsandbytes moved to a plugin.
"""

import re
from collections.abc import Iterator

from adaptkit.operations.targets import _checkpoint_rules, _rules, _scalings
from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._base_shapes import BaseShapes
from adaptkit.operations.targets._checkpoint_files import CheckpointFiles
from adaptkit.operations.targets._rules import VARIANTS
from adaptkit.operations.targets._single_experts import all_or_none
from adaptkit.operations.targets._target import Finding, Target, error_about, some

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_RANK = 16
_VOCABULARY = 258_048
_HEADS = ("score", "classifier")
_EMBEDDED = re.compile(r"\.(embed_tokens|lm_head)\.base_layer\.weight$")
_REFUSES = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication")
_MERGEABLE = ("use_dora", "lora_bias")


def _adapter(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    yield from _rules.weights(files, "vLLM")
    yield from _configuration(files, base)
    yield from _names(files)
    yield from _rules.halves(files, "vLLM fails when it scales the half that is missing")
    yield from _rules.other_layers(files, "vLLM")
    yield from _rules.ranks(files, "vLLM does not compare them and scales by the rank in adapter_config.json")
    yield from _scalings.reinterpreted_patterns(files, "vLLM")
    yield from _patterns(files)
    yield from _largest_rank(files)
    yield from _tables(files, base)
    yield from _experts(files)
    yield from all_or_none(files, base, "vLLM fails when it joins them")
    missing = "vLLM rejects the adapter, or silently drops the tensors if another module ends in the same name"
    yield from _rules.on_base(files, base, missing, "vLLM fails when it copies the tensors into its buffers")
    if base is None:
        yield from _rules.wrapped(files, missing)
    yield from _rules.tables(
        files, base, "error", "vLLM rejects an embedding whose size differs from the base's", files.merge()
    )


def _configuration(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    config = files.config
    yield from _rules.kind(files, "vLLM ignores this, and fails on keys or tensors that are not LoRA's")
    if _rules.is_lora(files) and "target_modules" not in config:
        yield Finding(
            "error",
            "target_modules is missing from adapter_config.json",
            "vLLM rejects a configuration without it",
            "set target_modules to all modules that have tensors in the file",
        )
    yield from _rules.numbers(files, "vLLM rejects them, or uses the wrong scaling")
    yield from _rules.variants(files, _MERGEABLE, "vLLM rejects {what}", files.merge())
    yield from _rules.variants(files, _REFUSES, "vLLM rejects {what}", files.merge_elsewhere())
    rest = {key for key in VARIANTS if key not in (*_REFUSES, *_MERGEABLE)}
    yield from _rules.variants(
        files, rest, "vLLM does not support {what} and computes plain LoRA", files.merge_elsewhere()
    )
    refuses = "vLLM rejects initializations that change the base (before 0.32 it wrongly accepted them)"
    takes = "vLLM ignores this, and applies the adapter to a base that it does not fit"
    is_lora_ga = str(config.get("init_lora_weights")).lower() == "lora_ga"  # peft changes the base only in training
    yield from _rules.begun(files, takes if is_lora_ga else refuses, "vLLM rejects unknown values from 0.32 on")
    yield from _rules.unknown_keys(files, "vLLM ignores unknown keys")
    if config.get("fan_in_fan_out") or (base is not None and base.is_transposed):
        yield Finding(
            "error",
            "fan_in_fan_out in adapter_config.json, or a base like GPT-2",
            "vLLM's GPT-2 does not support adapters",
            files.merge(),
        )
    biases = [key.name for key in files.keys if key.role == "bias" and not _is_head(key.module)]
    if config.get("bias", "none") != "none" or biases:
        what = some(biases) if biases else f"bias is {config['bias']!r} in adapter_config.json"
        yield Finding("error", what, "vLLM rejects trained biases", files.merge())


def _names(files: AdapterFiles) -> Iterator[Finding]:
    whole = [key for key in files.keys if key.role == "weight"]
    heads = [key.name for key in whole if _is_head(key.module)]
    rest = [key.name for key in whole if key.name not in heads]
    if heads:
        yield Finding(
            "warning",
            f"{some(heads)}: a full classification head",
            "vLLM accepts one such head, in models that it serves for classification; 0.31 and older reject it",
            "serve it with --runner pooling",
        )
    asked = [name for name in files.saved if name not in _HEADS]
    if rest or asked:
        what = some(rest) if rest else f"modules_to_save is {asked} in adapter_config.json"
        yield Finding("error", what, "vLLM rejects tensors that replace the base's", files.merge())
    for role, what in (("magnitude", "DoRA"), ("token rows", "trained token rows")):
        if files.named(role) and not (role == "magnitude" and files.config.get("use_dora")):  # reported by use_dora
            yield Finding("error", some(files.named(role)), f"vLLM rejects {what}", files.merge())
    other = [*files.named("other"), *(n for n in files.named("wrapped weight") if not _EMBEDDED.search(n))]
    yield from error_about(
        other,
        "",
        "vLLM rejects names that it cannot parse (… is unsupported LoRA weight)",
        f"run adaptkit resize {files.root} -o OUT --rank R, which writes peft's names if it recognizes these",
    )


def _is_head(module: str) -> bool:
    """Return whether vLLM loads the module, including its bias, as its classification head."""
    return module.rpartition(".")[2] in _HEADS


def _patterns(files: AdapterFiles) -> Iterator[Finding]:
    config = files.config
    flat = _scalings.flat_scaling(config.get("lora_alpha"), config.get("r"), config.get("use_rslora"))
    wrong = _scalings.scaled_wrongly(files, {pair.module: flat for pair in files.pairs})
    if wrong:
        _, meant, used = wrong[0]
        yield Finding(
            "warning",
            f"rank_pattern or alpha_pattern scales {some([name for name, _, _ in wrong])} by {meant:g}",
            f"vLLM applies patterns from 0.32 on; older versions silently scale by {used:g}",
            f"use vLLM 0.32 or newer, or {_scalings.flat_change(files)}",
        )


def _largest_rank(files: AdapterFiles) -> Iterator[Finding]:
    known = [pair.rank for pair in files.pairs if pair.rank]
    pattern = files.config.get("rank_pattern")
    asked = [files.config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]  # also without tensors
    largest = max([0, *known, *(rank for rank in asked if isinstance(rank, int))])
    if largest > _RANKS[-1]:
        yield Finding(
            "error",
            f"rank {largest}",
            f"vLLM supports ranks up to {_RANKS[-1]}",
            f"run adaptkit resize {files.root} -o OUT --rank {_RANKS[-1]}",
        )
    elif largest > _DEFAULT_RANK:
        enough = next(rank for rank in _RANKS if rank >= largest)
        yield Finding(
            "warning",
            f"rank {largest}",
            f"vLLM accepts ranks up to {_DEFAULT_RANK} by default",
            f"serve it with --max-lora-rank {enough}, or run adaptkit resize {files.root} -o OUT --rank "
            f"{_DEFAULT_RANK}",
        )


def _tables(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    tables = [pair for pair in files.pairs if pair.embedding or pair.module.endswith("lm_head")]
    if not tables:
        return
    yield Finding(
        "warning",
        f"{some([pair.module for pair in tables])}: embedding or head",
        "vLLM accepts these if its implementation of the architecture lists them in embedding_modules (Llama, Mixtral "
        "and Qwen3 do, Mistral and Qwen2 do not), and rejects them otherwise",
        f"if it rejects the adapter, {files.merge()}",
    )
    size = base.vocabulary if base else None
    if size and size > _VOCABULARY and any(pair.module.endswith("lm_head") for pair in tables):
        yield Finding(
            "error",
            f"lm_head with a vocabulary of {size}",
            f"vLLM adapts heads of up to {_VOCABULARY} entries",
            files.merge(),
        )


def _experts(files: AdapterFiles) -> Iterator[Finding]:
    stacked = _rules.experts(files)
    inner = {pair.module for pair in files.pairs if pair.stacked}
    halved = [name for name in inner if f"{name}.base_layer" not in inner and not name.endswith(".base_layer")]
    if halved:
        yield Finding(
            "error",
            f"{some(halved)}: only one of two stacks of experts",
            "vLLM fails unless both gate_up_proj and down_proj are adapted",
            files.merge(),
        )
    elif stacked:
        yield Finding(
            "warning",
            f"{some(stacked)}: stack of experts (target_parameters)",
            "vLLM accepts them if its model stores experts in stacks, and otherwise only with options",
            "serve it with --enable-mixed-moe-lora-format and is_3d_lora_weight=True in the LoRA request",
        )


def _checkpoint(files: CheckpointFiles) -> Iterator[Finding]:
    yield from _checkpoint_rules.quantization(files, "vLLM")
    if files.quantization == "bitsandbytes":
        yield Finding(
            "warning",
            "quant_method is bitsandbytes in config.json",
            "vLLM needs a plugin for it from 0.28 on, and loads such a checkpoint on one GPU only: it rejects "
            "tensor parallelism",
            "pip install vllm-bnb-plugin",
        )
        yield from _checkpoint_rules.storage(files, "vLLM")
    yield from _checkpoint_rules.stacks(files, "vLLM's plugin does not support such stacks")
    yield from _checkpoint_rules.beside(files, "vLLM")
    yield from _checkpoint_rules.model(
        files,
        "vLLM rejects a model with weights that were not loaded"
        if files.quantization is None
        else "vLLM computes with uninitialized memory",
        "vLLM fails: the shapes differ",
    )
    yield from _checkpoint_rules.tokenizer(
        files, "vLLM can load one from another folder", "serve it with --tokenizer FOLDER"
    )


TARGET = Target("vLLM 0.33.0", _adapter, _checkpoint)
