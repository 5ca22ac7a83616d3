"""GGUF: llama.cpp's converters and its reader of adapters.

``convert_lora_to_gguf.py`` sorts an adapter's tensors by their names and writes A, B and one alpha. When the result is
loaded, ``src/llama-adapter.h`` computes alpha / rank with each tensor's own rank, and ``src/llama-adapter.cpp``
compares shapes with the base and skips norms. ``conversion/base.py`` (formerly ``convert_hf_to_gguf.py``) reads
checkpoints, ``conversion/gpt2.py`` transposes matrices, and ``conversion/gemma.py`` and ``phi.py`` read tokenizers
only from SentencePiece files. Which formats of compressed-tensors it reads was compared with llama-cpp-python 0.3.36.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from adaptkit.checkpoint.layout import class_names, read_json
from adaptkit.operations.targets import _adapter_features as features
from adaptkit.operations.targets import _checkpoint_features as checkpoint
from adaptkit.operations.targets._adapter_features import ANOTHER_BASE, ONE_SAVE, PLAIN, variants
from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._checkpoint_files import CheckpointFiles
from adaptkit.operations.targets._target import Program, Sighting, error, seen, warning

_METHODS = {"bitnet", "fp8", "gptq", "compressed-tensors", "modelopt", "mxfp4"}
_NVFP4 = "nvfp4-pack-quantized"
_BY_CHANNEL = {"float-quantized", "int-quantized", "naive-quantized"}
_OF_SENTENCEPIECE = {"GemmaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM"}
_PLAIN_ROLES = {"A", "B", "embedding A", "embedding B", "wrapped weight"}
_NORM = re.compile(r"_layernorm|\.norm")

_SHAPE = "llama.cpp rejects the adapter: incorrect shape"
_NO_NAME = "{program} cannot map the name, or llama.cpp rejects the adapter: does not exist in base model"
_ORIGINAL = "convert the original 16-bit checkpoint"
ADAPTER = features.ALL_PROGRAMS | {
    "no LoRA": error("{program} ignores this, and fails on tensors that are not LoRA's", "{elsewhere}"),
    "invalid numbers": error("{program} fails without lora_alpha, or writes the wrong value", "{valid}"),
    **variants(PLAIN, "use_qalora", "use_bdlora", "layer_replication", "arrow_config", "kasa_config"),
    "changed base": error("{program} ignores this; the adapter does not fit the original base", "{unchanged}"),
    "LoRA-GA": error("{program} ignores this; the adapter does not fit the original base", "{unchanged}"),
    "no base named": warning("{program} needs the base's config.json", "convert it with --base FOLDER"),
    "quantized base": error(
        "{program} fails on its config.json: not yet supported",
        "convert with --base set to the original 16-bit checkpoint",
    ),
    "other scaling": error("llama.cpp silently scales by lora_alpha over the tensor's rank, here {used}", "{flat}"),
    "norms": error("{program} writes norms, but llama.cpp silently skips them"),
    "other tensors": error("{program} fails on tensors other than lora_A and lora_B"),
    "lost tensors": error("{program} does not notice, and writes plain LoRA", "save the adapter again with peft"),
    "half a pair": error("{program} fails on the half that is missing", ONE_SAVE),
    "other layers": features.LINEAR,
    "other rank": error("{program} fails if A and B differ; llama.cpp scales by the rank of the tensors", ONE_SAVE),
    "stacks": error("{program} cannot map the name"),
    "experts in part": error("{program} fails when it joins them into one tensor"),
    "transposed": error(
        "{program} transposes A and B like the base's matrices, though peft does not store them transposed; llama.cpp "
        "rejects what does not fit, and computes wrong results with square ones"
    ),
    "tied head": error(
        "llama.cpp has no separate output tensor if the head is tied to the embedding, and then rejects the adapter"
    ),
    "tied embedding": error(
        "llama.cpp loads the adapter, but crashes at the first token (GGML_ASSERT) if the head is tied to the embedding"
    ),
    "maybe tied": warning(
        "llama.cpp rejects LoRA of a head that is tied to the embedding, and crashes at the first token (GGML_ASSERT) "
        "with LoRA of an embedding that is",
        "give --base to find out whether they are tied; if so, {merge}",
    ),
    "absent": error(_NO_NAME, features.OTHER_NAMES),
    "layers more": error(_NO_NAME, features.OTHER_NAMES),
    "other shape": error(_SHAPE, ANOTHER_BASE),
    "other vocabulary": error(_SHAPE),
}
CHECKPOINT = checkpoint.ALL_PROGRAMS | {
    "other method": error("{program} fails: quant method is not yet supported", "{way}"),
    "other compression": error(
        f"{{program}} fails: it supports one config group of {', '.join(sorted(_BY_CHANNEL))} by channel or block, one "
        f"of pack-quantized integers by group, and {_NVFP4}",
        _ORIGINAL,
    ),
    "absent": error("llama.cpp rejects the converted file: missing tensor", checkpoint.CORRECT),
    "other shape": error("llama.cpp rejects the converted file: wrong shape", checkpoint.SAME_PLACE),
    "no tokenizer": warning("{program} fails without one", "copy the base's tokenizer files into the folder"),
    "no SentencePiece": error(
        "{program} fails: it reads the vocabulary of {name} from this file only",
        "copy the original model's tokenizer.model into the folder",
    ),
}


def _in_adapter(files: AdapterFiles) -> Iterator[Sighting]:
    yield from features.of_adapter(files, own_rank=True)
    config, base = files.config, files.base
    if base is None and not config.get("base_model_name_or_path"):
        yield Sighting("no base named", "base_model_name_or_path is missing from adapter_config.json")
    if base is not None and base.quantization is not None:
        unread = base.quantization if base.quantization not in _METHODS else _unread_compression(base.config)
        if unread:
            yield Sighting("quantized base", f"{base.root}: quantized with {unread}")
    others = [key.name for key in files.keys if key.role not in _PLAIN_ROLES]
    yield from seen("norms", [name for name in others if _NORM.search(name)])
    yield from seen("other tensors", [name for name in others if not _NORM.search(name)])
    if files.keys and not others and (config.get("use_dora") or files.saved):
        what = "use_dora or modules_to_save is set in adapter_config.json, but the file has no such tensors"
        yield Sighting("lost tensors", what)
    tables = [pair.module for pair in files.pairs if pair.embedding and features.is_table(pair.module)]
    if base is None:
        heads = [pair.module for pair in files.pairs if pair.leaf == "lm_head"]
        yield from seen("maybe tied", tables + heads, "{} is changed")
    elif base.is_tied:  # the head then uses the embedding's A, which is transposed
        yield from seen("tied embedding", tables, "{} is changed, but the base ties it to the head")


def _in_checkpoint(files: CheckpointFiles) -> Iterator[Sighting]:
    yield from checkpoint.of_checkpoint(files)
    if files.quantization not in (None, *_METHODS) and files.names_method:
        way = f"run adaptkit dequantize {files.root} -o OUT" if files.packed else _ORIGINAL
        yield Sighting("other method", f"quant_method is {files.quantization} in config.json", {"way": way})
    unread = _unread_compression(files.config)
    if unread:
        yield Sighting("other compression", f"config.json has {unread}")
    name, config = next(iter(class_names(files.config)), ""), files.root / "tokenizer_config.json"
    if files.has_tokenizer and name in _OF_SENTENCEPIECE and not (files.root / "tokenizer.model").is_file():
        kind = read_json(config).get("tokenizer_class") if config.is_file() else None
        if not (name.startswith("Phi") and kind == "GPT2Tokenizer"):  # Phi-4
            yield Sighting("no SentencePiece", "no tokenizer.model in the folder", {"name": name})


def _unread_compression(config: Mapping[str, Any]) -> str:
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


TARGET = Program(
    program="convert_lora_to_gguf.py",
    loader="convert_hf_to_gguf.py",
    version="llama.cpp's converters of autumn 2026",
    tried_in="",
    adapter=ADAPTER,
    checkpoint=CHECKPOINT,
    in_adapter=_in_adapter,
    in_checkpoint=_in_checkpoint,
)
