"""GGUF: llama.cpp's converters and its reader of adapters, as of autumn 2026.

``convert_lora_to_gguf.py`` sorts an adapter's tensors by their names and writes A, B and one alpha. When the result is
loaded, ``src/llama-adapter.h`` computes alpha / rank with each tensor's own rank, and ``src/llama-adapter.cpp``
compares shapes with the base and skips norms. ``conversion/base.py`` (formerly ``convert_hf_to_gguf.py``) reads
checkpoints, ``conversion/gpt2.py`` transposes matrices, and ``conversion/gemma.py`` and ``phi.py`` read tokenizers
only from SentencePiece files.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from adaptkit.checkpoint.layout import class_names, read_json
from adaptkit.operations.targets import _checkpoint_rules, _rules, _scalings
from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._base_shapes import BaseShapes
from adaptkit.operations.targets._checkpoint_files import CheckpointFiles
from adaptkit.operations.targets._rules import VARIANTS
from adaptkit.operations.targets._single_experts import all_or_none
from adaptkit.operations.targets._target import Finding, Target, error_about, some

_METHODS = {"bitnet", "fp8", "gptq", "compressed-tensors", "modelopt", "mxfp4"}
_NVFP4 = "nvfp4-pack-quantized"
_BY_CHANNEL = {"float-quantized", "int-quantized", "naive-quantized"}
_OF_SENTENCEPIECE = {"GemmaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM"}
_PLAIN = {"A", "B", "embedding A", "embedding B", "wrapped weight"}
_NORM = re.compile(r"_layernorm|\.norm")
_TAKES = ("use_dora", "lora_bias", "alora_invocation_tokens")  # the first two are reported by their tensors


def _adapter(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    yield from _rules.weights(files, "convert_lora_to_gguf.py")
    yield from _configuration(files, base)
    yield from _scalings.reinterpreted_patterns(files, "llama.cpp")
    yield from _scaling(files)
    yield from _names(files)
    yield from _rules.halves(files, "convert_lora_to_gguf.py fails on the half that is missing")
    yield from _rules.other_layers(files, "llama.cpp")
    yield from _rules.ranks(
        files, "convert_lora_to_gguf.py fails if A and B differ; llama.cpp scales by the rank of the tensors"
    )
    yield from _modules(files, base)
    yield from all_or_none(files, base, "convert_lora_to_gguf.py fails when it joins them into one tensor")
    yield from _rules.on_base(
        files,
        base,
        "convert_lora_to_gguf.py cannot map the name, or llama.cpp rejects the adapter: does not exist in base model",
        "llama.cpp rejects the adapter: incorrect shape",
    )
    yield from _rules.tables(files, base, "error", "llama.cpp rejects the adapter: incorrect shape", files.merge())


def _configuration(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    yield from _rules.kind(files, "convert_lora_to_gguf.py ignores this, and fails on tensors that are not LoRA's")
    yield from _rules.numbers(files, "convert_lora_to_gguf.py fails without lora_alpha, or writes the wrong value")
    yield from _rules.variants(
        files,
        {key for key in VARIANTS if key not in _TAKES},
        "convert_lora_to_gguf.py does not support {what} and writes plain LoRA",
        files.merge_elsewhere(),
    )
    yield from _rules.begun(files, "convert_lora_to_gguf.py ignores this; the adapter does not fit the original base")
    yield from _rules.unknown_keys(files, "convert_lora_to_gguf.py ignores unknown keys")
    if base is None and not files.config.get("base_model_name_or_path"):
        yield Finding(
            "warning",
            "base_model_name_or_path is missing from adapter_config.json",
            "convert_lora_to_gguf.py needs the base's config.json",
            "convert it with --base FOLDER",
        )
    if base is not None and base.quantization is not None:
        unread = base.quantization if base.quantization not in _METHODS else _unread(base.config)
        if unread:
            yield Finding(
                "error",
                f"{base.root}: quantized with {unread}",
                "convert_lora_to_gguf.py fails on its config.json: not yet supported",
                "convert with --base set to the original 16-bit checkpoint",
            )


def _scaling(files: AdapterFiles) -> Iterator[Finding]:
    alpha = files.config.get("lora_alpha")
    used = {pair.module: _scalings.flat_scaling(alpha, pair.rank) for pair in files.pairs}
    wrong = _scalings.scaled_wrongly(files, used)
    if wrong:
        _, meant, factor = wrong[0]
        why = "use_rslora" if files.config.get("use_rslora") else "alpha_pattern"
        yield Finding(
            "error",
            f"{why} in adapter_config.json scales {some([name for name, _, _ in wrong])} by {meant:g}",
            f"llama.cpp silently scales by lora_alpha over the tensor's rank, here {factor:g}",
            _scalings.flat_change(files),
        )


def _names(files: AdapterFiles) -> Iterator[Finding]:
    others = [key.name for key in files.keys if key.role not in _PLAIN]
    norms = [name for name in others if _NORM.search(name)]
    yield from error_about(
        norms, "", "convert_lora_to_gguf.py writes norms, but llama.cpp silently skips them", files.merge()
    )
    rest = [name for name in others if name not in norms]
    yield from error_about(
        rest, "", "convert_lora_to_gguf.py fails on tensors other than lora_A and lora_B", files.merge()
    )
    if files.keys and not others and (files.config.get("use_dora") or files.saved):
        yield Finding(
            "error",
            "use_dora or modules_to_save is set in adapter_config.json, but the file has no such tensors",
            "convert_lora_to_gguf.py does not notice, and writes plain LoRA",
            "save the adapter again with peft",
        )


def _modules(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    stacked = _rules.experts(files)
    yield from error_about(
        stacked, "stack of experts (target_parameters)", "convert_lora_to_gguf.py cannot map the name", files.merge()
    )
    if files.config.get("fan_in_fan_out") or (base is not None and base.is_transposed):
        yield Finding(
            "error",
            "fan_in_fan_out in adapter_config.json, or a base that stores its matrices transposed (GPT-2)",
            "convert_lora_to_gguf.py transposes A and B like the base's matrices, though peft does not store them "
            "transposed; llama.cpp rejects what does not fit, and computes wrong results with square ones",
            files.merge(),
        )
    head, merge_apart = _rules.tied_head(files, base), files.merge()
    if head is not None or (base is None and any(pair.module.endswith("lm_head") for pair in files.pairs)):
        yield Finding(
            "warning" if head is None else "error",
            f"{head or 'lm_head'} is changed{', but the base ties it to the embedding' if head else ''}",
            "llama.cpp has no separate output tensor if the head is tied to the embedding, and then rejects the "
            "adapter",
            merge_apart if head else f"give --base to find out whether they are tied; if so, {merge_apart}",
        )
    tables = [pair.module for pair in files.pairs if pair.embedding and _rules.is_table(pair.module)]
    if tables and (base is None or base.is_tied):  # the head then uses the embedding's A, which is transposed
        yield Finding(
            "warning" if base is None else "error",
            f"{some(tables)} is changed{', but the base ties it to the head' if base else ''}",
            "llama.cpp loads the adapter, but crashes at the first token (GGML_ASSERT) if the head is tied to the "
            "embedding",
            merge_apart if base else f"give --base to find out whether they are tied; if so, {merge_apart}",
        )


def _checkpoint(files: CheckpointFiles) -> Iterator[Finding]:
    yield from _checkpoint_rules.quantization(files, "convert_hf_to_gguf.py")
    if files.quantization not in (None, "adaptkit", *_METHODS) and files.names_method:
        yield Finding(
            "error",
            f"quant_method is {files.quantization} in config.json",
            "convert_hf_to_gguf.py fails: quant method is not yet supported",
            f"run adaptkit dequantize {files.root} -o OUT"
            if files.packed
            else "convert the original 16-bit checkpoint",
        )
    unread = _unread(files.config)
    if unread:
        yield Finding(
            "error",
            f"config.json has {unread}",
            f"convert_hf_to_gguf.py fails: it supports one config group of {', '.join(sorted(_BY_CHANNEL))} by "
            f"channel or block, one of pack-quantized integers by group, and {_NVFP4}",
            "convert the original 16-bit checkpoint",
        )
    yield from _checkpoint_rules.model(
        files,
        "llama.cpp rejects the converted file: missing tensor",
        "llama.cpp rejects the converted file: wrong shape",
    )
    yield from _checkpoint_rules.tokenizer(
        files, "convert_hf_to_gguf.py fails without one", "copy the base's tokenizer files into the folder"
    )
    yield from _vocabulary(files)


def _vocabulary(files: CheckpointFiles) -> Iterator[Finding]:
    """Find a tokenizer without the SentencePiece file that is required for some architectures."""
    named, config = class_names(files.config)[:1], files.root / "tokenizer_config.json"
    is_there = (files.root / "tokenizer.model").is_file()
    if is_there or not files.has_tokenizer or not _OF_SENTENCEPIECE.intersection(named):
        return
    is_phi = named[0].startswith("Phi")
    if is_phi and config.is_file() and read_json(config).get("tokenizer_class") == "GPT2Tokenizer":
        return  # Phi-4
    yield Finding(
        "error",
        "no tokenizer.model in the folder",
        f"convert_hf_to_gguf.py fails: it reads the vocabulary of {named[0]} from this file only",
        "copy the original model's tokenizer.model into the folder",
    )


def _unread(config: Mapping[str, Any]) -> str:
    """Return which format of compressed-tensors the converters do not read; empty if they read it."""
    given = config.get("quantization_config")
    if not isinstance(given, dict) or given.get("quant_method") != "compressed-tensors":
        return ""
    form, named = given.get("format"), given.get("config_groups")
    groups = [group for group in named.values() if isinstance(group, dict)] if isinstance(named, dict) else []
    mixed = form == "mixed-precision" and groups and all(group.get("format") == _NVFP4 for group in groups)
    of_kimi = form == "mxfp4-pack-quantized" and "KimiK3ForConditionalGeneration" in class_names(config)
    if form == _NVFP4 or mixed or of_kimi:
        return ""
    if len(groups) != 1:
        return f"compressed-tensors' {form} with {len(groups)} config_groups"
    weights = groups[0].get("weights")
    of = weights if isinstance(weights, dict) else {}
    by_channel = form in _BY_CHANNEL and of.get("strategy") in ("channel", "block") and of.get("group_size") is None
    in_groups = form == "pack-quantized" and of.get("strategy") == "group" and of.get("type", "int") == "int"
    if by_channel or in_groups:
        return ""
    return f"compressed-tensors' {form} of {of.get('num_bits')}-bit {of.get('type')}s by {of.get('strategy')}"


TARGET = Target("llama.cpp's converters of autumn 2026", _adapter, _checkpoint)
