"""Errors for weights in formats of other tools, pickles and GGUF, with hints that depend on the file's name."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from adaptkit.errors import CheckpointError

_STATES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
"""Prefixes of pickles with training state, which trainers save beside weights or checkpoint folders."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TO_SAFETENSORS = (
    "convert it with transformers: from_pretrained(..., dtype='auto') and save_pretrained(..., "
    "safe_serialization=True); then copy the tokenizer's files"
)
_RENAME = "rename {what} to pytorch_model.bin, with config.json beside it, and "
_HINTS = {
    r"pytorch_model(-\d+-of-\d+)?\.bin": _TO_SAFETENSORS,  # transformers finds no others
    "adapter_.*": "fetch it with `hf download` and pass that folder; the error then says how to convert it",
    r"qmodel\.pt": "it is quantized with HQQ: use the checkpoint that it was made from",
    r"lit_model\.pth": "run litgpt convert_from_litgpt on the folder, "
    f"{_RENAME.format(what='the model.pth that it writes')}{_TO_SAFETENSORS}",
}
"""Maps a pattern of a pickle's name to the hint for it."""
_OTHERWISE = (
    f"if its tensors have the names of transformers, {_RENAME.format(what='it')}{_TO_SAFETENSORS}; otherwise convert "
    "it to the format of transformers with the tool that wrote it"
)
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
_PICKLED = re.compile(r"(pytorch|adapter)_model(-\d+-of-\d+)?\.(bin|pt)")
_OTHER_WRITERS = {
    r"lit_model\.pth\.lora": (
        "LitGPT",
        "run litgpt merge_lora and then litgpt convert_from_litgpt, "
        f"{_RENAME.format(what='the model.pth that it writes')}save that and the base with transformers in float32; "
        "then run adaptkit extract on both",
    ),
    r"(pytorch_lora_weights|diffusion_pytorch_model)([.-].*)?\.(safetensors|bin)": ("diffusers", OF_IMAGES),
}
"""Maps a pattern of a file name to the tool that writes it, and the hint for it."""


def other_writer(name: str) -> tuple[str, str] | None:
    """Return the tool that writes files of this name, and the hint for them; None if it is not a known one."""
    return next((found for pattern, found in _OTHER_WRITERS.items() if re.fullmatch(pattern, name)), None)


def weights_beside(root: Path, names: Sequence[str] = WEIGHTS_BESIDE) -> str:
    """Return the name of a file with further trained weights beside an adapter; empty if there is none."""
    return next((name for name in names if (root / name).exists()), "")


def pickled_weights(root: Path) -> list[str]:
    """Return the names of the pickled weights in a folder, which programs may load even if it has safetensors files."""
    return sorted(path.name for path in root.iterdir() if _PICKLED.fullmatch(path.name))


def refuse_other_weights(where: object, names: Iterable[str]) -> None:
    """Reject weights in a format that is not supported.

    Args:
        where: the folder or repository, for the error.
        names: of its files, without those of a checkpoint.

    Raises:
        CheckpointError: one of the files is a pickle, GGUF or another tool's.
    """
    beside = {*WEIGHTS_BESIDE, *VALUE_HEADS}
    names = sorted(name for name in names if not name.startswith(_STATES) and name not in beside)
    if pickle := next((name for name in names if name.endswith(_PICKLES) and not other_writer(name)), ""):
        raise CheckpointError(
            f"{where}: weights are pickles ({pickle}), which adaptkit does not load",
            hint=next((hint for pattern, hint in _HINTS.items() if re.fullmatch(pattern, pickle)), _OTHERWISE),
        )
    for name in names:
        if found := other_writer(name):
            writer, hint = found
            raise CheckpointError(
                f"{where}: {name} is in the format of {writer}, which adaptkit does not read", hint=hint
            )
    if gguf := next((name for name in names if name.endswith(".gguf")), ""):
        raise CheckpointError(
            f"{where}: weights are GGUF ({gguf}), which adaptkit does not read",
            hint="use the checkpoint that it was made from",
        )
