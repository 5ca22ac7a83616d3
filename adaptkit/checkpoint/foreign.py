"""Detect files that adaptkit does not read, to refuse them by name: pickles, GGUF, diffusers, MLX."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptkit.errors import CheckpointError

_STATES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
"""Prefixes of pickles with training state, which trainers save beside weights or checkpoint folders."""
_PICKLES, _GGUF = (".bin", ".pt", ".pth", ".ckpt", ".lora"), ".gguf"
_OF_TRANSFORMERS = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
_PICKLED = re.compile(r"(pytorch|adapter)_model(-\d+-of-\d+)?\.(bin|pt)")
_TO_SAFETENSORS = (
    "convert it with transformers: from_pretrained(..., dtype='auto') and save_pretrained(..., "
    "safe_serialization=True); then copy the tokenizer's files"
)
_OTHERWISE = (
    "if its tensors have the names of transformers, rename it to pytorch_model.bin, with config.json beside it, and "
    f"{_TO_SAFETENSORS}; otherwise convert it to the format of transformers with the tool that wrote it"
)
_ORIGINAL = "use the checkpoint that it was made from"
_OF_IMAGES = re.compile(r"(pytorch_lora_weights|diffusion_pytorch_model)([.-].*)?\.(safetensors|bin)")
OF_IMAGES = "give a language model as transformers saves it, or an adapter of one as peft saves it"
"""The hint for models of images and their adapters."""
WEIGHTS_BESIDE = (
    "non_lora_trainables.bin", "non_lora_state_dict.bin", "trainable_params.bin", "vit.safetensors",
    "scoring_head.safetensors", "joint_head.safetensors",
)  # fmt: skip
"""Further trained weights that trainers save beside an adapter: LLaVA and its derivatives, LongLoRA, ms-swift, Unsloth.
"""
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
"""LLaMA-Factory's files beside an adapter: the scores of a reward model, or the estimates of PPO, for training only."""
PICKLED_WEIGHTS = "pytorch_model.bin"
"""A checkpoint's weights, or beside an adapter TRL's value head, for PPO only; only its content tells which."""


def is_of_diffusers(name: str) -> bool:
    """Return whether diffusers writes files of this name."""
    return _OF_IMAGES.fullmatch(name) is not None


def weights_beside(root: Path, names: Sequence[str] = WEIGHTS_BESIDE) -> str:
    """Return the name of a file with further trained weights beside an adapter; empty if there is none."""
    return next((name for name in names if (root / name).exists()), "")


def pickled_weights(root: Path) -> list[str]:
    """Return the names of the pickled weights in a folder, which programs may load even if it has safetensors files."""
    return sorted(path.name for path in root.iterdir() if _PICKLED.fullmatch(path.name))


def refuse_other_weights(where: object, names: Iterable[str]) -> None:
    """Reject pickles, GGUF and another tool's weights among the files of a folder or repository, ``where``."""
    beside = {*WEIGHTS_BESIDE, *VALUE_HEADS}
    kept = (name for name in names if not name.startswith(_STATES) and name not in beside)
    for name in sorted(kept, key=lambda name: (name.endswith(_GGUF), name)):  # a pickle beside it can be converted
        if is_of_diffusers(name):
            problem, hint = f"{name} is in the format of diffusers, which adaptkit does not read", OF_IMAGES
        elif name.endswith(_PICKLES):
            problem = f"weights are pickles ({name}), which adaptkit does not load"
            hint = _TO_SAFETENSORS if _OF_TRANSFORMERS.fullmatch(name) else _OTHERWISE
            if name.startswith("adapter_"):
                hint = "fetch it with `hf download` and pass that folder; the error then says how to convert it"
        elif name.endswith(_GGUF):
            problem, hint = f"weights are GGUF ({name}), which adaptkit does not read", _ORIGINAL
        else:
            continue
        raise CheckpointError(f"{where}: {problem}", hint=hint)


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
