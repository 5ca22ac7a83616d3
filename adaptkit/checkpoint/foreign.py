"""Detect the quantization method of a checkpoint from its configuration, or from its tensors' names and types."""

import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.reader import Checkpoint

RELEASED = ("fp8", "mxfp4")
"""Methods that some models are released in, without a 16-bit checkpoint; ``dequantize`` makes one."""
_STATED = "quantization_config"
_INT8 = "bitsandbytes (LLM.int8())"
_BY_NAME = (
    (re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$"), "bitsandbytes (4 bits)"),
    (re.compile(r"\.quant_state\.adaptkit__int8$"), "adaptkit (int8)"),
    (re.compile(r"(^|\.)SCB$"), _INT8),
    (re.compile(r"(^|\.)g_idx$"), "GPTQ"),
    (re.compile(r"(^|\.)qweight$"), "GPTQ or AWQ"),
    (re.compile(r"(^|\.)weight_packed$"), "compressed-tensors"),
    (re.compile(r"(^|\.)weight_scale_inv$"), "fp8"),
    (re.compile(r"(^|\.)W_q$"), "HQQ"),
    (re.compile(r"(^|\.)weight(\._data)?\._data$"), "quanto"),
    (re.compile(r"(^|\.)_weight_qdata$"), "torchao"),
)


def quantization_found(checkpoint: Checkpoint) -> str | None:
    """Return the name of a checkpoint's quantization method, or None if it is not quantized.

    ``config.json`` is trusted if it names a method. Otherwise the tensors decide: names that are specific to a method,
    8-bit floats, or 8-bit integer weights with a scale.
    """
    method = checkpoint.quantization_method
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


def quantization_named(names: Collection[str]) -> str | None:
    """Return the name of the quantization method that tensors' names show, or None if they show none."""
    for pattern, method in _BY_NAME:
        if any(pattern.search(name) for name in names):
            return method
    if any(name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in names for name in names):
        return "mxfp4"
    if any(name.endswith(".codebooks") and f"{name.removesuffix('books')}s" in names for name in names):
        return "AQLM"
    return None


def stated_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a configuration, or of its language model's; empty if there is none."""
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, dict) else {}):
        if isinstance(found := holder.get(_STATED), dict):
            return found
    return {}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without ``quantization_config``, and without those of the models inside it."""
    kept = {name: value for name, value in config.items() if name != _STATED}
    inner = {name: value for name, value in kept.items() if isinstance(value, dict) and _STATED in value}
    return kept | {name: {k: v for k, v in value.items() if k != _STATED} for name, value in inner.items()}


def hint_for_plain(method: str, root: Path, purpose: str) -> str:
    """Return the hint for a command that needs an unquantized checkpoint instead of the one in ``root``.

    Args:
        method: of the one in ``root``.
        root: folder.
        purpose: what to do with an unquantized checkpoint, as an imperative that ends in a preposition if it needs one.
    """
    if method in RELEASED:
        return f"run: adaptkit dequantize {shlex.quote(str(root))} -o PLAIN; then {purpose} PLAIN"
    return f"{purpose} the 16-bit checkpoint that it was made from"
