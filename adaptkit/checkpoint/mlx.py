"""Detect adapters in MLX's format: ``adapters.safetensors`` with A and B transposed, and another configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def mlx_hint(root: Path, config: Mapping[str, Any]) -> str:
    """Return a hint for converting an MLX adapter; empty if the configuration is not MLX's.

    MLX's lora_a is (in, rank) and lora_b (rank, out); their product is multiplied by ``scale``. DoRA's m is (out,).
    """
    if config.get("peft_type") is not None or "lora_parameters" not in config:
        return ""
    norms = ", m is lora_magnitude_vector, with use_dora: true" if config.get("fine_tune_type") == "dora" else ""
    return (
        f"run mlx_lm.fuse --model BASE --adapter-path {root} --save-path TUNED, then adaptkit extract TUNED BASE "
        "--rank R -o ADAPTER; or convert it to peft's format: A and B are lora_a and lora_b transposed, lora_alpha is "
        f"scale * rank{norms}"
    )
