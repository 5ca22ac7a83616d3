"""Adapters as MLX writes them: ``adapters.safetensors`` with A and B transposed, and a configuration of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def way_from_mlx(root: Path, config: Mapping[str, Any]) -> str:
    """What to do with an adapter of MLX's; empty if its configuration is not MLX's.

    Its lora_a is (in, rank) and its lora_b (rank, out); what they make is multiplied by its scale.
    """
    if config.get("peft_type") is not None or "lora_parameters" not in config:
        return ""
    return (
        f"run mlx_lm.fuse --model BASE --adapter-path {root} --save-path TUNED, then adaptkit extract TUNED BASE "
        "--rank R -o ADAPTER; or convert it to peft's format: A and B are lora_a and lora_b transposed, lora_alpha is "
        "scale * rank"
    )
