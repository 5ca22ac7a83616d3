"""peft with transformers 5; the answers come from their sources and from trying them.

``peft/peft_model.py`` and ``utils/save_and_load.py`` build the modules that ``adapter_config.json`` asks for, and then
load tensors with ``load_state_dict(strict=False)``: unexpected tensors are dropped silently, and missing ones keep
their initial value, after one warning. A module with a LoRA has its original tensors in ``base_layer``. A module in
``modules_to_save`` is replaced with all its tensors, and peft requires each of them. A checkpoint is read by
transformers: ``model.safetensors`` or the files that the index names, and no others.
"""

from collections.abc import Iterator

from adaptkit.operations.targets import _adapter_features as features
from adaptkit.operations.targets import _checkpoint_features as checkpoint
from adaptkit.operations.targets._adapter_features import ANOTHER_BASE, ONE_SAVE, RENAME
from adaptkit.operations.targets._checkpoint_files import CheckpointFiles
from adaptkit.operations.targets._peft_experts import EXPERTS
from adaptkit.operations.targets._peft_features import of_adapter
from adaptkit.operations.targets._target import Program, Sighting, error, seen, warning

_DROPS = "peft silently drops it, so it changes nothing"
_SIZE = "peft fails: size mismatch"
_SAVE_AGAIN = "save the adapter again with peft"
_SET_ALPHA = "unless this is intended, set lora_alpha or alpha_pattern to the value used in training"
_REMOVE_SAVED = f"remove the module from modules_to_save, or {_SAVE_AGAIN}"
ADAPTER = (
    features.ALL_PROGRAMS
    | EXPERTS
    | {
        "unknown type": error("peft fails on unknown types", "if it is a new type, pip install -U peft"),
        "refused value": error("peft fails with {failure}", "{way}"),
        "unusable numbers": error("peft fails when it builds the modules", "{valid}"),
        "alpha of zero": warning("peft loads it, but it changes nothing there", _SET_ALPHA),
        "alpha below zero": warning("peft loads it, but subtracts what was learned there", _SET_ALPHA),
        "alpha not finite": error("peft then computes NaN", ONE_SAVE),
        "no targets": error(
            "peft uses its default modules for this model type, and silently drops all others",
            "set target_modules to {ends}",
        ),
        "target twice": error("peft fails with ValueError", "remove it from one of them"),
        "no target": error(
            "peft creates no LoRA there, and silently drops its tensors",
            "add it to target_modules, and its layer to layers_to_transform if that is set",
        ),
        "unused parameter": warning(
            "peft ignores it if the model has no such parameter, and otherwise adds a LoRA with its initial values",
            "remove it from target_parameters",
        ),
        "vector parameter": error(
            "peft fails with ValueError", "remove it, or write a longer name that only the intended parameters end with"
        ),
        "not generating": error(
            "peft fails with AttributeError", "set task_type to FEATURE_EXTRACTION, or to the base's task"
        ),
        "foreign names": error(f"{_DROPS} (if all names are like this, peft warns once and loads no tensors)", RENAME),
        "other names": error(_DROPS, "remove it, or load it with the program that wrote it"),
        "not asked for": error(
            f"without {{key}}, peft has no {{tensors}}; {_DROPS}", "set {key} in adapter_config.json"
        ),
        "asked for": error("peft keeps the initial value, {initial}, after one warning", _SAVE_AGAIN),
        "half a pair": error("peft keeps the initial value of the other half, which is random or zero", ONE_SAVE),
        "other rank": error(_SIZE, ONE_SAVE),
        "not saved": error("peft fails with KeyError if the model has such a module", _REMOVE_SAVED),
        "module not saved": error("peft fails with KeyError", _REMOVE_SAVED),
        "no rows": error("peft fails with KeyError", f"remove it, or {_SAVE_AGAIN}"),
        "other rows": error(_SIZE, _SAVE_AGAIN),
        "rows beyond": error(
            "peft fails with IndexError",
            "call model.resize_token_embeddings before the adapter is loaded, or give the base that it was trained on",
        ),
        "wrapped without LoRA": error(_DROPS, "remove it, or remove .base_layer from its name"),
        "whole beside LoRA": error(
            _DROPS, "if it differs from the base's, rename it to .base_layer.weight or .base_layer.bias"
        ),
        "wrapper": error(f"{_DROPS}, unless the model has that wrapper too", RENAME),
        "absent": error(_DROPS, features.OTHER_NAMES),
        "layers more": error(_DROPS, features.OTHER_NAMES),
        "whole of nothing": error(_DROPS, "remove it, or give the base that it was trained on"),
        "other shape": error(_SIZE, ANOTHER_BASE),
        "whole of other shape": error(_SIZE, "give the base that it was trained on"),
        "other vocabulary": warning(
            "peft fails (size mismatch) unless the model's vocabulary is resized first",
            "call model.resize_token_embeddings({entries}) before the adapter is loaded",
        ),
        "read by kernels": error("peft rejects an adapter there, since kernels of {kind} read the weight directly"),
        "never called": error(
            "peft's adapter there has no effect, since {kind} reads the weight directly and never calls the module"
        ),
        "unsupported module": error("peft fails: Target module {kind} is not supported"),
        "renamed": error(f"peft renames it to {{other}} by transformers' rules for older names; {_DROPS}"),
        "tied head": warning(
            "peft changes only the head while the adapter is loaded, but merge_and_unload changes the embedding, too",
            "do not merge it with peft; {merge}",
        ),
    }
)
CHECKPOINT = checkpoint.ALL_PROGRAMS | {
    "load_in_4bit": warning("transformers takes it for bitsandbytes", "set quant_method to bitsandbytes"),
    "bitsandbytes": warning("transformers needs bitsandbytes to load it", "pip install bitsandbytes"),
    "compressed-tensors": warning("transformers needs compressed-tensors to load it", "pip install compressed-tensors"),
    "zero points": warning(
        "transformers fails on their shape, unless it decodes the weights when it loads them",
        "pass quantization_config=CompressedTensorsConfig(dequantize=True)",
    ),
    "gptq": warning("transformers needs optimum and GPTQModel to load it", "pip install optimum gptqmodel"),
    "awq": warning("transformers needs GPTQModel to load it", "pip install gptqmodel"),
    "modelopt": error("transformers does not know this method", "run adaptkit dequantize {root} -o OUT"),
    "edges of blocks": error(
        "transformers fails, or silently decodes wrong values at the edges",
        "run adaptkit dequantize {root} -o OUT, or quantize the original with --format fp8",
    ),
    "no metadata": error("transformers fails: KeyError: 'metadata'", 'add "metadata": {{}} to it'),
    "uneven rows": warning(
        "bitsandbytes 0.50 decodes wrong values on a CPU",
        "quantize with a --block-size that divides the row length, or exclude these modules with --skip",
    ),
    "quantized expert": error(
        "transformers 5 keeps experts in 16-bit stacks and fails on packed ones", checkpoint.KEEP_EXPERTS
    ),
    "absent": error("transformers initializes it at random, with a warning", checkpoint.CORRECT),
    "no tokenizer": warning("AutoTokenizer finds none here", "load the base's tokenizer"),
}


def _in_checkpoint(files: CheckpointFiles) -> Iterator[Sighting]:
    yield from checkpoint.of_checkpoint(files)
    four_bit = [packed for packed in files.packed if not packed.is_stack]
    uneven = [packed.name for packed in four_bit if packed.shape[-1] % packed.block_size]
    yield from seen("uneven rows", uneven, "row length is not a multiple of the block size")


TARGET = Program(
    program="peft",
    loader="transformers",
    version="peft 0.21.2 with transformers 5",
    tried_in="tests/operations/test_check.py",
    adapter=ADAPTER,
    checkpoint=CHECKPOINT,
    in_adapter=of_adapter,
    in_checkpoint=_in_checkpoint,
)
