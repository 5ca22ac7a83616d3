"""Detect EoRA adapters, which compensate the error of one quantized checkpoint, in the format of GPTQModel."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptkit.errors import AdapterError


def refuse_eora(root: Path, config: Mapping[str, Any]) -> None:
    """Reject an adapter that GPTQModel wrote; it writes no others than EoRA.

    Its configuration has keys of peft's, ``megatron_core`` among them, but none that is null or empty, nor
    ``inference_mode``, which peft always writes; ``lora_alpha`` is the rank.

    Raises:
        AdapterError: names the quantized checkpoint.
    """
    by_peft = "megatron_core" not in config or "inference_mode" in config or None in config.values()
    if not by_peft and config.get("r") == config.get("lora_alpha"):
        base = config.get("base_model_name_or_path") or "a quantized checkpoint"
        raise AdapterError(
            f"{root}: an EoRA adapter of GPTQModel, which only compensates the quantization error of {base}",
            hint="use it with that quantized checkpoint; a 16-bit checkpoint needs no compensation",
        )
