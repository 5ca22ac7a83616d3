"""Detect EoRA adapters, which compensate the error of one quantized checkpoint, in the format of GPTQModel."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptkit.errors import AdapterError


def refuse_eora(root: Path, config: Mapping[str, Any]) -> None:
    """Reject an adapter that GPTQModel wrote; it writes no others than EoRA.

    Its configuration has keys of peft's, also those that are false, but none that is null or empty, nor
    ``inference_mode``, which peft always writes; ``lora_alpha`` is the rank.

    Raises:
        AdapterError: names the quantized checkpoint.
    """
    has_keys = {"megatron_core", "fan_in_fan_out"} <= config.keys() and "inference_mode" not in config
    if has_keys and None not in config.values() and config.get("r") == config.get("lora_alpha"):
        base = config.get("base_model_name_or_path") or "a quantized checkpoint"
        raise AdapterError(
            f"{root}: an EoRA adapter of GPTQModel, which only compensates the quantization error of {base}",
            hint="use it with that quantized checkpoint; a 16-bit checkpoint needs no compensation",
        )
