"""vLLM: its LoRA loader and model loader.

``vllm/lora/peft_helper.py`` checks the configuration, ``lora_model.py`` and ``utils.py`` the names of tensors, and
``config/lora.py`` the ranks; ``model_manager.py`` handles experts; ``model_loader/default_loader.py`` finds the files
of a checkpoint. Version differences: from 0.32 on, rank and alpha patterns apply, and initializations that change the
base are rejected; in 0.28, bitsandbytes moved to a plugin.
"""

from collections.abc import Iterator

from adaptkit.checkpoint.layout import class_names
from adaptkit.operations.targets import _adapter_features as features
from adaptkit.operations.targets import _checkpoint_features as checkpoint
from adaptkit.operations.targets._adapter_features import ANOTHER_BASE, ONE_SAVE, PLAIN, REJECTS, RENAME, variants
from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._target import Program, Sighting, error, seen, warning

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_RANK = 16
_LARGEST_VOCABULARY = 258_048
_CLASSIFIERS = ("score", "classifier")
_TABLES = ("embed_tokens", "lm_head")
_WITH_TABLES = """
    Apertus DeciLM Ernie4_5_ Exaone4 FalconH1 Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared InternLM3 Jamba Lfm2
    Lfm2Moe Llama Llama4 MiniCPM MiniCPM3 Mixtral Nemotron NemotronH Phi3 PhiMoE Qwen3 Qwen3Moe Qwen3_5 Qwen3_5Moe Solar
"""
"""Language models (without ``ForCausalLM``) whose ``embedding_modules`` are those."""
_WITHOUT_TABLES = """
    Deepseek DeepseekV2 DeepseekV3 Ernie4_5_Moe GPTNeoX Gemma Gemma2 Gemma3 Gemma4 Glm4 Glm4Moe GptOss InternLM2 MiMo
    MiniMaxM2 Ministral3 Mistral OPT Olmoe Qwen2 Qwen2Moe Qwen3Next
"""
"""Language models that have none."""

_NO_PARSE = "vLLM rejects names that it cannot parse (… is unsupported LoRA weight)"
_NO_MODULE = "vLLM rejects the adapter, or silently drops the tensors if another module ends in the same name"
ADAPTER = features.ALL_PROGRAMS | {
    "no LoRA": error("vLLM ignores this, and fails on keys or tensors that are not LoRA's", "{elsewhere}"),
    "no target_modules": error(
        "vLLM rejects a configuration without it", "list all modules that have tensors in the file"
    ),
    "invalid numbers": error("vLLM rejects them, or uses the wrong scaling", "{valid}"),
    "use_dora": error(REJECTS),
    "lora_bias": error(REJECTS),
    **variants(REJECTS, "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication"),
    **variants(PLAIN, "arrow_config", "kasa_config"),
    "changed base": error(
        "vLLM rejects initializations that change the base (0.31 and older ignore it)", "{unchanged}"
    ),
    "LoRA-GA": error("vLLM ignores this, and applies the adapter to a base that it does not fit", "{unchanged}"),
    "unknown start": error("vLLM rejects unknown values from 0.32 on", features.TRUE_START),
    "other scaling": warning(
        "vLLM applies patterns from 0.32 on; older versions silently scale by {used}", "use 0.32 or newer, or {flat}"
    ),
    "rank with a flag": warning(
        f"vLLM accepts ranks up to {_DEFAULT_RANK} by default",
        f"serve it with --max-lora-rank {{enough}}, or run adaptkit resize {{root}} -o OUT --rank {_DEFAULT_RANK}",
    ),
    "rank too large": error(
        f"vLLM supports ranks up to {_RANKS[-1]}", f"run adaptkit resize {{root}} -o OUT --rank {_RANKS[-1]}"
    ),
    "biases": error("vLLM rejects trained biases"),
    "classifier": warning(
        "vLLM accepts one such head, in models that it serves for classification; 0.31 and older reject it",
        "serve it with --runner pooling",
    ),
    "replaced tensors": error("vLLM rejects tensors that replace the base's"),
    "magnitudes": error("vLLM rejects DoRA"),
    "token rows": error("vLLM rejects trained token rows"),
    "other names": error(_NO_PARSE, RENAME),
    "half a pair": error("vLLM fails when it scales the half that is missing", ONE_SAVE),
    "other layers": features.LINEAR,
    "other rank": error("vLLM does not compare them and scales by the rank in adapter_config.json", ONE_SAVE),
    "rejected tables": error("vLLM rejects these: the model's embedding_modules do not list them"),
    "tables": warning(
        "vLLM accepts these if its implementation of the architecture lists them in embedding_modules (Llama, Mixtral "
        "and Qwen3 do, Mistral and Qwen2 do not), and rejects them otherwise",
        "give --base to find out; if it rejects the adapter, {merge}",
    ),
    "large head": error(f"vLLM adapts heads of up to {_LARGEST_VOCABULARY} entries"),
    "one stack": error("vLLM fails unless both gate_up_proj and down_proj are adapted"),
    "both stacks": warning(
        "vLLM accepts them if its model stores experts in stacks, and otherwise only with options",
        "serve it with --enable-mixed-moe-lora-format and is_3d_lora_weight=True in the LoRA request",
    ),
    "experts in part": error("vLLM fails when it joins them"),
    "transposed": error("vLLM's GPT-2 does not support adapters"),
    "layers more": warning(
        "vLLM silently drops these tensors, and applies the others", f"if the base should have them, {ANOTHER_BASE}"
    ),
    "absent": error(_NO_MODULE, features.OTHER_NAMES),
    "wrapper": error(_NO_MODULE, RENAME),
    "other shape": error("vLLM fails when it copies the tensors into its buffers", ANOTHER_BASE),
    "other vocabulary": error("vLLM rejects an embedding whose size differs from the base's"),
}
CHECKPOINT = checkpoint.SERVERS | {
    "bitsandbytes": warning(
        "vLLM needs a plugin for it from 0.28 on, and loads such a checkpoint on one GPU only: it rejects tensor "
        "parallelism",
        "pip install vllm-bnb-plugin",
    ),
    "uneven fused blocks": error(
        "vLLM joins it with others into one matrix, and fails unless blocks end where they do",
        "quantize the original with --format fp8 and without --block-size",
    ),
    "absent": error(
        "vLLM rejects the model, or computes with uninitialized memory if it is quantized",
        checkpoint.CORRECT,
    ),
    "no tokenizer": warning("vLLM can load one from another folder", "serve it with --tokenizer FOLDER"),
}


def _in_adapter(files: AdapterFiles) -> Iterator[Sighting]:
    yield from features.of_adapter(files, rslora=True)
    config, pairs = files.config, files.pairs
    if files.is_lora and "target_modules" not in config:
        yield Sighting("no target_modules", "target_modules is missing from adapter_config.json")
    pattern = config.get("rank_pattern")
    asked = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]  # also without tensors
    rank = max([0, *(pair.rank or 0 for pair in pairs), *(value for value in asked if isinstance(value, int))])
    if rank > _RANKS[-1]:
        yield Sighting("rank too large", f"rank {rank}")
    elif rank > _DEFAULT_RANK:
        yield Sighting("rank with a flag", f"rank {rank}", {"enough": next(r for r in _RANKS if r >= rank)})
    yield from _whole_tensors(files)
    yield from _tables(files)
    names = {pair.module for pair in pairs if pair.stacked}
    alone = [name for name in names if f"{name}.base_layer" not in names and not name.endswith(".base_layer")]
    yield from seen("one stack", alone, "only one of two stacks of experts")
    for sighting in features.of_stacks(files) if not alone else ():
        yield Sighting("both stacks", sighting.found)


def _whole_tensors(files: AdapterFiles) -> Iterator[Sighting]:
    config = files.config
    heads = [key for key in files.keys if key.module.rpartition(".")[2] in _CLASSIFIERS]  # with their biases
    others = [key for key in files.keys if key not in heads]
    biases, trained = [key.name for key in others if key.role == "bias"], config.get("bias", "none")
    yield from seen("biases", biases)
    if trained != "none" and not biases:
        yield Sighting("biases", f"bias is {trained!r} in adapter_config.json")
    yield from seen("classifier", [key.name for key in heads if key.role == "weight"], "a full classification head")
    replaced = [key.name for key in others if key.role == "weight"]
    asked = [name for name in files.saved if name not in _CLASSIFIERS]
    yield from seen("replaced tensors", replaced)
    if asked and not replaced:
        yield Sighting("replaced tensors", f"modules_to_save is {asked} in adapter_config.json")
    yield from seen("magnitudes", [] if config.get("use_dora") else files.named("magnitude"))
    yield from seen("token rows", files.named("token rows"))
    names = files.named("other", *(() if config.get("lora_bias") else ("bias of B",)))
    ignored = tuple(f".{table}.base_layer.weight" for table in _TABLES)
    yield from seen("other names", names + [n for n in files.named("wrapped weight") if not n.endswith(ignored)])


def _tables(files: AdapterFiles) -> Iterator[Sighting]:
    base = files.base
    model = next(iter(class_names(base.config)), "").removesuffix("ForCausalLM") if base else ""
    pairs = [pair for pair in files.pairs if pair.embedding or pair.is_head]
    names = [pair.module for pair in pairs if pair.leaf in _TABLES]
    rejected = names if model in _WITHOUT_TABLES.split() else []
    rejected = rejected + [pair.module for pair in pairs if pair.module not in names]
    yield from seen("rejected tables", rejected, "embedding or head")
    is_known = model in (_WITH_TABLES + _WITHOUT_TABLES).split()
    yield from seen("tables", [] if is_known else names, "embedding or head")
    size = base.vocabulary if base else None
    if size and size > _LARGEST_VOCABULARY and any(pair.leaf == "lm_head" for pair in pairs):
        yield Sighting("large head", f"lm_head with a vocabulary of {size}")


TARGET = Program(
    program="vLLM",
    loader="vLLM",
    version="vLLM 0.33.0",
    tried_in="scripts/check_targets.py",
    adapter=ADAPTER,
    checkpoint=CHECKPOINT,
    in_adapter=_in_adapter,
    in_checkpoint=checkpoint.of_checkpoint,
)
