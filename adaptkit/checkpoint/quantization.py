"""Find the quantization method of a checkpoint, in its configuration or in its tensors' names and types."""

import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.formats._find import method_shown, quantized_names, read_outline, released_methods, stored_weights
from adaptkit.formats._stored import StoredWeight

_STATED = "quantization_config"
_INT8 = "bitsandbytes (LLM.int8())"
_OF_OTHERS = (
    (re.compile(r"(^|\.)SCB$"), _INT8),
    (re.compile(r"(^|\.)g_idx$"), "GPTQ"),
    (re.compile(r"(^|\.)qweight$"), "GPTQ or AWQ"),
    (re.compile(r"(^|\.)weight_packed$"), "compressed-tensors"),
    (re.compile(r"(^|\.)W_q$"), "HQQ"),
    (re.compile(r"(^|\.)weight(\._data)?\._data$"), "quanto"),
    (re.compile(r"(^|\.)_weight_qdata$"), "torchao"),
)


def quantization_found(checkpoint: Checkpoint) -> str | None:
    """Return the name of a checkpoint's quantization method, or None if it is not quantized.

    ``config.json`` is trusted if it names a method. Otherwise the tensors decide: names that are specific to a method,
    8-bit floats, or 8-bit integer weights with a scale.
    """
    method = stated_method(checkpoint.config)
    if method == "bitsandbytes" and checkpoint.config["quantization_config"].get("load_in_8bit"):
        return _INT8  # the one method of bitsandbytes that is not supported
    names = checkpoint.tensors
    if method is not None or (method := quantization_named(names)) is not None:
        return method
    scaled = {name.removesuffix("_scale") for name in names if name.endswith(".weight_scale")}
    if any(located.spec.dtype.startswith("F8_") for located in names.values()):
        return "compressed-tensors" if scaled else "fp8"
    by_type = {"I8": "compressed-tensors", "U8": "BitNet"}
    types = [names[weight].spec.dtype for weight in sorted(scaled & set(names))]
    return next((by_type[dtype] for dtype in types if dtype in by_type), None)


def stated_method(config: Mapping[str, Any]) -> str | None:
    """Return the ``quant_method`` in a configuration, or that it names none; None if it is not quantized."""
    stated = config.get("quantization_config")
    if stated is None:
        return None
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    return "a method that config.json does not name" if method is None else str(method)


def quantization_named(names: Collection[str]) -> str | None:
    """Return the name of the quantization method that tensors' names show, or None if they show none."""
    if (ours := method_shown(names)) is not None:
        return ours
    for pattern, method in _OF_OTHERS:
        if any(pattern.search(name) for name in names):
            return method
    if any(name.endswith(".codebooks") and f"{name.removesuffix('books')}s" in names for name in names):
        return "AQLM"
    return None


def is_released(method: Any) -> bool:
    """Whether some models are released in a method, without a 16-bit checkpoint; ``dequantize`` makes one."""
    return method in released_methods()


def packed_weights(checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """Return the quantized weights that the trainer keeps packed, by name: the parts of block-wise ones are unchecked.

    Empty if there are none, or if some can only be used once they are dequantized.

    Raises:
        CheckpointError: a weight is malformed.
    """
    if names := quantized_names(checkpoint):
        return {name: read_outline(checkpoint, name) for name in names}
    if not is_released(method := quantization_found(checkpoint)):
        return {}
    found = stored_weights(checkpoint, method)
    return {weight.name: weight for weight in found} if all(weight.has_rows for weight in found) else {}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without ``quantization_config``, and without those of the models inside it."""
    kept = {name: value for name, value in config.items() if name != _STATED}
    inner = {name: value for name, value in kept.items() if isinstance(value, dict) and _STATED in value}
    return kept | {name: {k: v for k, v in value.items() if k != _STATED} for name, value in inner.items()}


def hint_for_plain(method: str, root: Path, purpose: str) -> str:
    """Return the hint for a command that needs an unquantized checkpoint instead of the one in ``root``.

    ``purpose`` is what to do with it, as an imperative that ends in a preposition if it needs one.
    """
    if is_released(method):
        return f"run: adaptkit dequantize {shlex.quote(str(root))} -o PLAIN; then {purpose} PLAIN"
    return f"{purpose} the 16-bit checkpoint that it was made from"
