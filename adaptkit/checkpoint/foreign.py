"""Detect what adaptkit does not read, to refuse it by name: quantized weights, pickles, GGUF, diffusers, MLX.

A quantization method is found in a checkpoint's configuration, or in its tensors' names and types.
"""

import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.errors import CheckpointError

if TYPE_CHECKING:
    from adaptkit.checkpoint.reader import Checkpoint

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


def quantization_found(checkpoint: "Checkpoint") -> str | None:
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
    from adaptkit.formats._find import method_shown  # imported here, since loading numpy is slow

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
    from adaptkit.formats._find import released_methods

    return method in released_methods()


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
